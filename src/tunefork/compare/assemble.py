"""From the run folders of a comparison to one `Comparison`: intervals, differences, verdict."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import get_args

from tunefork.compare.comparison import (
    ARMS,
    Arm,
    Comparison,
    Data,
    Device,
    Forgetting,
    LossPoint,
    MethodResult,
    Model,
    PairedDifference,
    SearchTrial,
)
from tunefork.compare.search import SearchResult
from tunefork.compare.verdict import decide
from tunefork.evaluate.evaluate import FORGETTING, load_columns, primary_metric
from tunefork.evaluate.statistics import Columns, estimate, paired_difference
from tunefork.installed import OWN_VERSION
from tunefork.page.estimate import Estimate
from tunefork.recipe import Metric, Recipe
from tunefork.recipe_file import relative
from tunefork.registry.run import COLUMNS, STEPS, RunRecord, read_record
from tunefork.train.events import EVENTS, read_steps

MOST_POINTS = 200
"""Of a loss curve in comparison.json; the run folder keeps every step."""


@dataclass(frozen=True, slots=True)
class ArmRuns:
    """What one arm of the comparison left behind."""

    folders: Sequence[Path] = ()
    """Run folders of the seeds that finished, in the order of the recipe's."""
    search: SearchResult | None = None
    error: str | None = None
    records: list[RunRecord] = field(default_factory=list)
    columns: list[Columns] = field(default_factory=list)

    def read(self) -> None:
        """Fill `records` and `columns` from the folders."""
        for folder in self.folders:
            record = read_record(folder)
            assert record is not None, folder
            self.records.append(record)
            self.columns.append(load_columns(folder / COLUMNS))

    def of(self, seeds: Sequence[int]) -> list[Columns]:
        """The columns of `seeds`, in that order."""
        by_seed = {
            record.seed: columns for record, columns in zip(self.records, self.columns, strict=True)
        }
        return [by_seed[seed] for seed in seeds]


def assemble(recipe: Recipe, out: Path, arms: dict[Arm, ArmRuns], data: Data) -> Comparison:
    """Compute every figure of the comparison from what the arms left in `out`."""
    for runs in arms.values():
        runs.read()
    samples = recipe.evaluate.bootstrap_samples
    methods = {arm: _result(recipe, out, arms, arm) for arm in ARMS if arm in arms}
    finished = [arm for arm in methods if arms[arm].records]
    paired = tuple(
        _pair(a, b, metric, arms, samples)
        for a, b in combinations(reversed(finished), 2)
        for metric in methods[a].metrics
    )
    records = [record for runs in arms.values() for record in runs.records]
    model = Model(id=recipe.model.id, parameters=records[0].total_params if records else 0)
    primary = primary_metric(recipe, data.labels is not None)
    return Comparison(
        tunefork_version=OWN_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=_device(records),
        model=model,
        data=data,
        primary_metric=primary,
        margin=recipe.compare.margin,
        usd_per_hour=recipe.compare.usd_per_hour,
        seeds=recipe.compare.seeds,
        methods=methods,
        paired=paired,
        verdict=decide(
            methods, paired, metric=primary, margin=recipe.compare.margin, model=model, data=data
        ),
        recipe=relative(recipe, Path.cwd()).model_dump(mode="json"),
    )


def _result(recipe: Recipe, out: Path, arms: dict[Arm, ArmRuns], arm: Arm) -> MethodResult:
    runs = arms[arm]
    if not runs.records:
        return MethodResult(
            status="failed", error=runs.error, search=_trials(runs), search_s=_search_s(runs)
        )
    first, records = runs.records[0], runs.records
    trained = arm != "base"
    train_s = sum(record.train_s for record in records) / len(records)
    samples = recipe.evaluate.bootstrap_samples
    peaks = [r.peak_memory_bytes for r in records if r.peak_memory_bytes is not None]
    hours = (train_s + (_search_s(runs) or 0.0)) / 3600
    price = recipe.compare.usd_per_hour
    deltas = first.trainable_params if arm in ("lora", "qlora") else 0
    return MethodResult(
        status="ok",
        error=runs.error,
        trainable_share=first.trainable_params / (first.total_params + deltas),
        trainable_params=first.trainable_params,
        total_params=first.total_params + deltas,
        peak_memory_bytes=max(peaks, default=None),
        memory_kind=first.memory_kind,
        predicted_memory_bytes=first.predicted_memory_bytes,
        predicted_train_s=(
            None if first.predicted_step_s is None else first.predicted_step_s * first.num_steps
        ),
        train_s=train_s if trained else None,
        tokens_per_s=sum(r.tokens for r in records) / (train_s * len(records)) if trained else None,
        trained_tokens=first.tokens if trained else None,
        artifact_bytes=first.artifact_bytes,
        artifact=(
            None
            if first.artifact is None
            else (runs.folders[0] / first.artifact).relative_to(out).as_posix()
        ),
        learning_rate=first.learning_rate,
        metrics={
            metric: _estimate(metric, runs.columns, samples)
            for metric in get_args(Metric)
            if metric in first.metrics
        },
        forgetting=_forgetting(arms, arm, samples),
        cost_usd=None if price is None or not trained else price * hours,
        search_s=_search_s(runs),
        search=_trials(runs),
        seeds=tuple(record.seed for record in records),
        loss_curve=_curve(runs.folders[0]) if trained else (),
    )


def _estimate(metric: str, columns: Sequence[Columns], samples: int) -> Estimate:
    interval = estimate(metric, columns, samples=samples)
    return Estimate(value=interval.value, low=interval.low, high=interval.high)


def _pair(
    a: Arm, b: Arm, metric: Metric, arms: dict[Arm, ArmRuns], samples: int
) -> PairedDifference:
    """Of the seeds that both finished; unpaired and of all runs where there is none, or where one
    side is the base, which no seed changes."""
    seeds = _common_seeds(arms[a], arms[b]) if "base" not in (a, b) else ()
    found = paired_difference(
        metric,
        arms[a].of(seeds) if seeds else arms[a].columns,
        arms[b].of(seeds) if seeds else arms[b].columns,
        samples=samples,
        by_seed=bool(seeds),
    )
    return PairedDifference(
        a=a,
        b=b,
        metric=metric,
        difference=found.value,
        low=found.low,
        high=found.high,
        share_above=found.share_above,
        examples=found.num_examples,
        seeds=seeds,
    )


def _common_seeds(a: ArmRuns, b: ArmRuns) -> tuple[int, ...]:
    """Seeds of which both have a run. A failed one leaves a gap, so places say nothing."""
    of_b = {record.seed for record in b.records}
    return tuple(record.seed for record in a.records if record.seed in of_b)


def _forgetting(arms: dict[Arm, ArmRuns], arm: Arm, samples: int) -> Forgetting | None:
    base, runs = arms["base"], arms[arm]
    if not base.records or FORGETTING not in base.records[0].metrics:
        return None
    before = estimate(FORGETTING, base.columns, samples=samples).value
    if arm == "base":
        return Forgetting(before=before, after=before, change=None)
    change = paired_difference(FORGETTING, runs.columns, base.columns, samples=samples)
    return Forgetting(
        before=before,
        after=estimate(FORGETTING, runs.columns, samples=samples).value,
        change=Estimate(value=change.value, low=change.low, high=change.high),
    )


def _search_s(runs: ArmRuns) -> float | None:
    return None if runs.search is None else runs.search.search_s


def _trials(runs: ArmRuns) -> tuple[SearchTrial, ...]:
    trials = () if runs.search is None else runs.search.trials
    return tuple(SearchTrial.model_validate(trial.model_dump()) for trial in trials)


def _curve(folder: Path) -> tuple[LossPoint, ...]:
    """The steps of a run, evenly thinned; the last one is always there."""
    points = [step.model_dump() for step in read_steps(folder / EVENTS)]
    if not points and (folder / STEPS).is_file():
        lines = (folder / STEPS).read_text(encoding="utf-8").splitlines()
        points = [json.loads(line) for line in lines]
    kept = points[::-1][:: -(-len(points) // MOST_POINTS) or 1][::-1]
    return tuple(LossPoint(**{k: p[k] for k in LossPoint.model_fields}) for p in kept)


def _device(records: Sequence[RunRecord]) -> Device:
    first = records[0]
    return Device(
        name=str(first.device["name"]),
        threads=int(first.device["threads"]) if first.memory_kind == "resident" else None,
        memory_bytes=int(first.device["memory_bytes"]),
        torch=first.versions["torch"],
        transformers=first.versions["transformers"],
    )
