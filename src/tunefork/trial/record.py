"""A run's record: what it was, what was predicted of it, what it measured."""

import sys
from functools import cache
from pathlib import Path

from tunefork.evaluate.evaluate import Evaluation, save_columns
from tunefork.evaluate.statistics import estimate
from tunefork.model.device import describe, pick_device
from tunefork.model.fingerprint import check_identity
from tunefork.model.identity import Identity
from tunefork.model.load import load_skeleton
from tunefork.plan.gate import Prediction, learn
from tunefork.recipe import Method, ModelSection, Recipe
from tunefork.registry.history import remember_run
from tunefork.registry.provenance import now, read_provenance, versions, write_provenance
from tunefork.registry.run import COLUMNS, RunRecord, write_record
from tunefork.train.loop import TrainResult
from tunefork.train.precision_choice import PrecisionChoice
from tunefork.trial.artifact import write_run_card


def check_base(record: RunRecord, found: Identity, folder: Path) -> None:
    """Raise IdentityError where the base is no longer `found`, what it was when the run began."""
    if record.identity is not None:
        check_identity(record.identity, found, what=str(folder), base=record.model_id)


def with_prediction(record: RunRecord, prediction: Prediction, result: TrainResult) -> RunRecord:
    """The record with what was predicted, which is remembered beside what it took."""
    learn(
        prediction,
        device=str(record.device["name"]),
        case=(
            f"{record.method} of {record.total_params / 1e9:.3g}B, "
            f"{record.tokens / record.num_steps:.0f} tokens a step"
        ),
        num_steps=result.num_steps,
        train_s=result.seconds,
        process_bytes=result.process_bytes,
        say=lambda line: print(line, file=sys.stderr),
    )
    on_gpu = record.memory_kind == "cuda_allocated"
    predicted = prediction.tensor_bytes if on_gpu else prediction.process_bytes
    return record.model_copy(
        update={"predicted_memory_bytes": predicted, "predicted_step_s": prediction.step_s}
    )


def finish(evaluation: Evaluation, recipe: Recipe, record: RunRecord, folder: Path) -> RunRecord:
    """Write the columns and the record that counts as done, which is returned."""
    save_columns(evaluation.columns, folder / COLUMNS)
    measured = {
        "status": "ok",
        "evaluate_s": evaluation.seconds,
        "majority_share": evaluation.majority_share,
        "metrics": metric_intervals(evaluation, recipe),
    }
    record = record.model_copy(update=measured)
    if record.artifact is not None:
        artifact = folder / record.artifact
        if (provenance := read_provenance(artifact)) is not None:
            measured_too = provenance.model_copy(update={"metrics": record.metrics})
            write_provenance(artifact, measured_too)
        write_run_card(folder, record)
    write_record(folder, record)
    remember_run(folder, record)
    return record


def begin_record(
    recipe: Recipe,
    method: Method | None,
    identity: Identity,
    *,
    seed: int,
    learning_rate: float | None = None,
    result: TrainResult | None = None,
    precision: PrecisionChoice | None = None,
) -> RunRecord:
    """What is known before anything is saved or evaluated; no `result`: the untrained base."""
    device = pick_device()
    is_interrupted = result is not None and result.status == "interrupted"
    return RunRecord(
        status="interrupted" if is_interrupted else "trained",
        method=method,
        seed=seed,
        learning_rate=learning_rate,
        precision=precision,
        model_id=recipe.model.id,
        model_revision=recipe.model.revision,
        identity=identity,
        total_params=_total_params(recipe.model, identity),
        trainable_params=0,
        num_steps=0 if result is None else result.num_steps,
        artifact_step=_artifact_step(result),
        validation_loss=None if result is None else result.validation_loss,
        tokens=0 if result is None else result.tokens,
        supervised_tokens=0 if result is None else result.supervised_tokens,
        train_s=0.0 if result is None else result.seconds,
        tokens_per_s=None if result is None else result.tokens / result.seconds,
        activation_checkpointing=None if method is None else recipe.train.checkpointing,
        peak_memory_bytes=None if result is None else result.peak_memory_bytes,
        memory_kind="cuda_allocated" if device.type == "cuda" else "resident",
        evaluate_s=0.0,
        majority_share=None,
        metrics={},
        artifact=None,
        artifact_bytes=None,
        created=now(),
        device=describe(device),
        versions=versions(),
    )


@cache
def _total_params(section: ModelSection, identity: Identity) -> int:
    """Of the base: counted once for all of a sweep's or a comparison's runs."""
    return sum(p.numel() for p in load_skeleton(section).parameters())


def _artifact_step(result: TrainResult | None) -> int | None:
    if result is None or result.kept_step == result.num_steps:
        return None
    return result.kept_step


def metric_intervals(
    evaluation: Evaluation, recipe: Recipe
) -> dict[str, tuple[float, float, float]]:
    """Value and 95 % interval of every metric that was measured."""
    samples = recipe.evaluate.bootstrap_samples
    found = {m: estimate(m, [evaluation.columns], samples=samples) for m in evaluation.metrics}
    return {metric: (i.value, i.low, i.high) for metric, i in found.items()}
