"""Run folders become `sweep.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tunefork.evaluate.evaluate import FORGETTING, load_columns, primary_metric
from tunefork.evaluate.statistics import Columns, paired_difference
from tunefork.installed import OWN_VERSION
from tunefork.model.device import describe, pick_device
from tunefork.page.estimate import Estimate
from tunefork.recipe import Method, Metric, Recipe
from tunefork.recipe_file import relative
from tunefork.registry.provenance import now, versions
from tunefork.registry.run import COLUMNS, RunRecord, read_record
from tunefork.sweep.effects import knob_effects, rank_effect, rate_effect
from tunefork.sweep.fleet import Outcome
from tunefork.sweep.group import Member
from tunefork.sweep.halving import Ranked, mean_loss
from tunefork.sweep.ranking import Judge, Run, as_estimate, choose, configurations
from tunefork.sweep.recommend import recommend
from tunefork.sweep.result import Rung, SweepResult, VariantResult
from tunefork.sweep.rungs import Rungs
from tunefork.sweep.variants import Variant
from tunefork.train.events import EVENTS, Validated, read_events


def assemble(
    recipe: Recipe,
    out: Path,
    found: Sequence[Variant],
    members: Mapping[str, Member],
    outcomes: Mapping[str, Outcome],
    *,
    rungs: Rungs | None,
    base: Path,
    together: int,
) -> SweepResult:
    """What all of it comes to; `base` is the untouched base's run folder."""
    data, first = members[found[0].name].data, members[found[0].name]
    base_record, base_columns = read_record(base), load_columns(base / COLUMNS)
    runs = [
        _run(each, members[each.name], outcomes[each.name], out, rungs, base_columns, recipe)
        for each in found
    ]
    judge = Judge(
        metric=primary_metric(recipe, data.labels is not None),
        margin=recipe.compare.margin,
        samples=recipe.evaluate.bootstrap_samples,
    )
    chosen = choose(runs)
    ranked = configurations(runs, judge, chosen)
    tokens, wall_s = (sum(getattr(r.result, what) for r in runs) for what in ("tokens", "train_s"))
    peaks = [o.record.peak_memory_bytes for o in outcomes.values() if o.record is not None]
    return SweepResult(
        tunefork_version=OWN_VERSION,
        created=now(),
        model_id=relative(recipe, Path.cwd()).model.id,
        method="qlora" if recipe.method is Method.QLORA else "lora",
        recipe=relative(recipe, Path.cwd()).model_dump(mode="json"),
        primary_metric=judge.metric,
        margin=judge.margin,
        train_examples=len(first.examples),
        validation_examples=len(first.validation),
        eval_examples=len(data.eval),
        base_metrics={} if base_record is None else _metrics(base_record),
        majority_share=None if base_record is None else base_record.majority_share,
        variants=tuple(run.result for run in runs),
        configurations=tuple(ranked),
        chosen=chosen,
        recommended=None if chosen is None else recommend(runs, judge, chosen),
        rank_effect=None if chosen is None else rank_effect(runs, judge, chosen),
        rate_effect=None if chosen is None else rate_effect(runs, judge),
        knobs=tuple(knob_effects(runs, judge)),
        together=together,
        wall_s=wall_s,
        tokens_per_s=tokens / wall_s if wall_s else None,
        peak_memory_bytes=max((peak for peak in peaks if peak is not None), default=None),
        device=describe(pick_device()),
        versions=versions(),
    )


def _run(
    variant: Variant,
    member: Member,
    outcome: Outcome,
    out: Path,
    rungs: Rungs | None,
    base: Columns,
    recipe: Recipe,
) -> Run:
    record, is_ok = outcome.record, outcome.status == "ok"
    columns = load_columns(member.folder / COLUMNS) if is_ok else None
    history = [] if rungs is None else rungs.history(variant.name)
    validation_loss = None
    if is_ok:
        validation_loss = _last_validation(member.folder)
    elif rungs is not None and (passed := rungs.count(variant.name)):
        measured = rungs.measured(passed - 1, variant.name)
        validation_loss = None if measured is None else mean_loss([measured])
    result = VariantResult(
        name=variant.name,
        folder=member.folder.relative_to(out).as_posix(),
        configuration=variant.configuration,
        values=variant.values,
        rank=member.recipe.lora.rank,
        alpha=member.recipe.lora.alpha,
        learning_rate=member.learning_rate,
        seed=member.recipe.train.seed,
        status=outcome.status,
        num_steps=0 if record is None else record.num_steps,
        planned_steps=member.num_steps,
        tokens=0 if record is None else record.tokens,
        trainable_params=0 if record is None else record.trainable_params,
        train_s=outcome.seconds if record is None or not record.train_s else record.train_s,
        artifact_bytes=None if record is None else record.artifact_bytes,
        validation_loss=validation_loss,
        metrics=_metrics(record) if is_ok and record is not None else {},
        forgetting=_forgetting(columns, base, recipe),
        rungs=tuple(
            _rung(ranked, step) for ranked, step in zip(history, member.rungs, strict=False)
        ),
        error=outcome.error,
    )
    return Run(result, columns)


def _last_validation(folder: Path) -> float | None:
    """As its events say: those of a run that was gone on with alone too."""
    told = (line.what for line in read_events(folder / EVENTS))
    losses = [event.validation_loss for event in told if isinstance(event, Validated)]
    return losses[-1] if losses else None


def _rung(ranked: Ranked, step: int) -> Rung:
    return Rung(
        step=step,
        validation_loss=ranked.loss,
        place=ranked.place,
        of=ranked.of,
        is_kept=ranked.is_kept,
        behind=ranked.behind,
    )


def _metrics(record: RunRecord) -> dict[Metric, Estimate]:
    return {
        metric: Estimate(value=value, low=low, high=high)  # type: ignore[misc]
        for metric, (value, low, high) in record.metrics.items()
        if metric != FORGETTING
    }


def _forgetting(columns: Columns | None, base: Columns, recipe: Recipe) -> Estimate | None:
    if columns is None or recipe.evaluate.forgetting is None:
        return None
    samples = recipe.evaluate.bootstrap_samples
    return as_estimate(paired_difference(FORGETTING, [columns], [base], samples=samples))
