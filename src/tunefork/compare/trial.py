"""One run of one method, from recipe to artefact and evaluation; or of the base, untrained.

`tunefork train` is one trial; `tunefork compare` is a base trial and one for each method and seed.
"""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tunefork.data.loader import load_data
from tunefork.evaluate.evaluate import Evaluation, check_metrics, evaluate, save_columns
from tunefork.evaluate.statistics import estimate
from tunefork.model.build import check_lora
from tunefork.model.device import describe, pick_device, pick_dtype
from tunefork.model.load import (
    load_model,
    load_skeleton,
    load_tokenizer,
    without_progress_bars,
)
from tunefork.recipe import Method, Recipe, anchor
from tunefork.registry.opening import open_model
from tunefork.registry.peft_format import save_adapter
from tunefork.registry.run import (
    ADAPTER,
    COLUMNS,
    MODEL,
    STEPS,
    RunRecord,
    claim,
    folder_bytes,
    read_record,
    write_record,
)
from tunefork.train.loop import StepRecord, TrainResult
from tunefork.train.method import load_for_training, plan_steps, train_method
from tunefork.train.progress import TrainProgress


def run_trial(
    recipe: Recipe, method: Method | None, folder: Path, *, seed: int, learning_rate: float | None
) -> RunRecord:
    """Train `method` on all training examples (None: leave the base as it is), evaluate, save.

    The artefact is saved before the evaluation, so that a failure there loses no training.
    """
    device = pick_device()
    dtype = pick_dtype(recipe.train.precision, device)
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    result: TrainResult | None = None
    artifact: str | None = None
    if method is None:
        model = load_model(recipe.model, dtype=dtype, device=device)
    else:
        assert learning_rate is not None
        model = load_for_training(recipe, method, dtype=dtype, device=device, seed=seed)
        num_steps = len(plan_steps(recipe, len(data.train), seed=seed))
        with (
            _step_log(folder / STEPS) as log,
            TrainProgress(
                str(method), num_steps=num_steps, device=device, every_s=recipe.train.log_every_s
            ) as progress,
        ):

            def on_step(record: StepRecord) -> None:
                log(record)
                progress.on_step(record)

            result = train_method(
                model,
                data.train,
                recipe,
                method,
                learning_rate=learning_rate,
                seed=seed,
                pad_id=pad_id(tokenizer),
                on_step=on_step,
            )
        artifact = MODEL if method is Method.FULL else ADAPTER
        _save(model, tokenizer, method, recipe, folder / artifact)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    evaluation = evaluate(model, tokenizer, data, recipe)
    save_columns(evaluation.columns, folder / COLUMNS)
    record = {
        "status": "ok" if result is None else result.status,
        "method": method,
        "seed": seed,
        "learning_rate": learning_rate,
        "model_id": recipe.model.id,
        "model_revision": recipe.model.revision,
        "total_params": base_parameters(recipe),
        "trainable_params": 0 if method is None else trained,
        "num_steps": 0 if result is None else len(result.steps),
        "tokens": 0 if result is None else result.tokens,
        "supervised_tokens": 0 if result is None else result.supervised_tokens,
        "train_s": 0.0 if result is None else result.seconds,
        "tokens_per_s": None if result is None else result.tokens / result.seconds,
        "peak_memory_bytes": None if result is None else result.peak_memory_bytes,
        "memory_kind": "cuda_allocated" if device.type == "cuda" else "resident",
        "evaluate_s": evaluation.seconds,
        "majority_share": evaluation.majority_share,
        "metrics": metric_intervals(evaluation, recipe),
        "artifact": artifact,
        "artifact_bytes": None if artifact is None else folder_bytes(folder / artifact),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": describe(device),
        "versions": versions(),
    }
    written = RunRecord.model_validate(record)
    write_record(folder, written)
    return written


def train_run(recipe: Recipe, folder: Path) -> RunRecord:
    """`tunefork train`: the recipe's method in a run folder of its own."""
    recipe = anchor(recipe, Path.cwd())
    if recipe.method is not Method.FULL:
        check_lora(load_skeleton(recipe.model), recipe.lora)
    check_metrics(recipe, load_data(recipe, load_tokenizer(recipe.model)))
    claim(folder, recipe)
    done = read_record(folder)
    if done is not None and done.status == "ok":
        return done
    return run_trial(
        recipe,
        recipe.method,
        folder,
        seed=recipe.train.seed,
        learning_rate=recipe.learning_rate(recipe.method),
    )


def evaluate_target(target: str, recipe: Recipe) -> dict[str, tuple[float, float, float]]:
    """Metrics (value, low, high) of a run, adapter or model on the recipe's evaluation examples."""
    opened = open_model(target, precision=recipe.train.precision)
    data = load_data(recipe, opened.tokenizer)
    return metric_intervals(evaluate(opened.model, opened.tokenizer, data, recipe), recipe)


def metric_intervals(
    evaluation: Evaluation, recipe: Recipe
) -> dict[str, tuple[float, float, float]]:
    """Value and 95 % interval of every metric that was measured."""
    samples = recipe.evaluate.bootstrap_samples
    found = {m: estimate(m, [evaluation.columns], samples=samples) for m in evaluation.metrics}
    return {metric: (i.value, i.low, i.high) for metric, i in found.items()}


def pad_id(tokenizer: Any) -> int:
    """An id to pad with; any will do, since padding is masked by position."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def base_parameters(recipe: Recipe) -> int:
    """Parameters of the recipe's base, from its config alone."""
    return sum(p.numel() for p in load_skeleton(recipe.model).parameters())


def versions() -> dict[str, str]:
    """What a figure's reproduction needs."""
    packages = ("tunefork", "torch", "transformers", "bitsandbytes", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _save(model: Any, tokenizer: Any, method: Method, recipe: Recipe, folder: Path) -> None:
    if method is Method.FULL:
        with without_progress_bars():
            model.save_pretrained(folder)
    else:
        save_adapter(model, folder, recipe.lora, base=recipe.model.id)
    tokenizer.save_pretrained(folder)


@contextmanager
def _step_log(file: Path) -> Iterator[Any]:
    """Writes each step as a JSON line, visible at once to whoever follows the file."""
    with file.open("w", encoding="utf-8", buffering=1) as stream:

        def write(record: StepRecord) -> None:
            stream.write(json.dumps(asdict(record)) + "\n")

        yield write
