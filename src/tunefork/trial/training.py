"""Training within a trial: from the newest checkpoint on, rehearsed, followed, its end recorded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tunefork.data.example import Encoded
from tunefork.data.loader import Data, validation_split
from tunefork.errors import BadInputError, RunFolderError
from tunefork.evaluate.evaluate import (
    pad_id,
    rehearse,
)
from tunefork.model.device import pick_device, pick_dtype
from tunefork.model.identity import Identity
from tunefork.recipe import Method, Recipe
from tunefork.registry.run import (
    RECORD,
    RunRecord,
    folder_bytes,
    read_record,
    write_record,
)
from tunefork.train.checkpoints import FOLDER as CHECKPOINTS
from tunefork.train.checkpoints import Found
from tunefork.train.events import EVENTS, read_steps
from tunefork.train.loop import StepRecord, TrainResult
from tunefork.train.method import (
    load_for_training,
    open_checkpoints,
    plan_steps,
    train_method,
)
from tunefork.train.out_of_memory import Remedies, phase
from tunefork.train.progress import TrainProgress
from tunefork.train.rehearsal import Rehearsal, Stage
from tunefork.train.state import Progress
from tunefork.trial.artifact import write_artifact
from tunefork.trial.following import Following, failure
from tunefork.trial.record import begin_record


@contextmanager
def failure_recorded(
    recipe: Recipe,
    method: Method,
    identity: Identity,
    folder: Path,
    *,
    seed: int,
    learning_rate: float,
) -> Iterator[None]:
    """An error that ends the training within is in run.json: no such run is taken for a good one.

    Bad input is found before anything is trained, and leaves whatever record there is.
    """
    try:
        yield
    except BadInputError:
        raise
    except Exception as error:
        record_failure(
            error, recipe, method, identity, folder, seed=seed, learning_rate=learning_rate
        )
        raise


def record_failure(
    error: Exception,
    recipe: Recipe,
    method: Method,
    identity: Identity,
    folder: Path,
    *,
    seed: int,
    learning_rate: float,
) -> RunRecord:
    """Say in run.json, and in the record returned, that `error` ended the training."""
    steps = read_steps(folder / EVENTS)
    record = begin_record(recipe, method, identity, seed=seed, learning_rate=learning_rate)
    failed = {
        "status": "failed",
        "error": failure(error),
        "num_steps": steps[-1].step if steps else 0,
        "tokens": steps[-1].tokens if steps else 0,
    }
    record = record.model_copy(update=failed)
    with suppress(OSError):  # a full disk: events.jsonl and the exit status say it
        write_record(folder, record)
    return record


def train(
    recipe: Recipe,
    method: Method,
    identity: Identity,
    data: Data,
    tokenizer: Any,
    folder: Path,
    told: Following,
    *,
    seed: int,
    learning_rate: float,
) -> tuple[Any, TrainResult]:
    """The base, loaded and trained, from the newest checkpoint on where there is one."""
    device = pick_device()
    dtype = pick_dtype(recipe.train.precision, device)
    examples, validation = held_back(data, recipe)
    checkpoints = open_checkpoints(
        folder / CHECKPOINTS,
        examples,
        recipe,
        method,
        base_sha256=identity.of_model(),
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        say=told.say,
    )
    checkpoints.on_written = told.on_written
    start = checkpoints.newest()
    may_begin(folder, start, told.say)
    told.begin_training(folder, recipe, method, seed=seed, learning_rate=learning_rate, start=start)
    with phase("load", Remedies.of(recipe, method)):
        model = load_for_training(
            recipe, method, dtype=dtype, device=device, seed=seed, examples=examples
        )
    done = start.facts.progress() if start else Progress()
    num_steps = len(plan_steps(recipe, len(examples), seed=seed))
    every_s = recipe.train.log_every_s
    with TrainProgress(
        str(method), num_steps=num_steps, device=device, every_s=every_s, start=done
    ) as progress:

        def on_step(record: StepRecord) -> None:
            told.on_step(record, num_steps, device)
            progress.on_step(record)

        def on_rehearsed(found: Rehearsal | None) -> None:
            told.begin_steps(done.tokens, found)
            progress.restart()

        result = train_method(
            model,
            examples,
            recipe,
            method,
            learning_rate=learning_rate,
            seed=seed,
            pad_id=pad_id(tokenizer),
            on_step=on_step,
            checkpoints=checkpoints,
            start=start,
            on_event=told.on_event,
            stage=_stage(model, tokenizer, data, recipe, method, folder),
            on_rehearsed=on_rehearsed,
            validate_on=validation,
        )
    return model, result


def held_back(data: Data, recipe: Recipe) -> tuple[list[Encoded], list[Encoded]]:
    """What is trained on, and what is validated on, which is nothing unless the recipe asks.

    The same for every seed and method of a comparison.
    """
    if recipe.train.validate_every_steps is None:
        return data.train, []
    return validation_split(
        data.train,
        recipe.train.validation_share,
        recipe.data_seed,
        "leave train.validate_every_steps out",
    )


def _stage(
    model: Any, tokenizer: Any, data: Data, recipe: Recipe, method: Method, folder: Path
) -> Stage:
    """What the rehearsal goes through beside the training passes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    state_bytes = sum(
        p.numel() * _state_bytes_a_value(recipe, method, p.element_size()) for p in trained
    )
    is_timed = recipe.train.checkpoint_every_s or recipe.train.checkpoint_every_steps
    # One more than is kept, while it is written; those there already are part of it.
    num_kept = recipe.train.keep_checkpoints + 1 if is_timed else 1
    num_kept += recipe.train.keep == "best"
    there = folder_bytes(folder / CHECKPOINTS)
    return Stage(
        folder=folder,
        evaluate=lambda: rehearse(model, tokenizer, data, recipe),
        save=lambda at: write_artifact(model, tokenizer, recipe, method, at),
        kept=lambda artefact_bytes: max(0, artefact_bytes + num_kept * state_bytes - there),
    )


def _state_bytes_a_value(recipe: Recipe, method: Method, weight_bytes: int) -> int:
    """Of a checkpoint: the weight, both moments, and the master copy where there is one."""
    if method is not Method.FULL:
        return weight_bytes + 8
    moments = {"adamw": 8, "adamw_bf16": 4, "adamw_8bit": 2}[recipe.full.optimizer]
    has_copy = recipe.full.weights == "fp32" and weight_bytes < 4
    return weight_bytes + moments + (4 if has_copy else 0)


def may_begin(folder: Path, start: Found | None, say: Callable[[str], None]) -> None:
    """Say what is gone on with; raise RunFolderError rather than train over what was learnt."""
    record = read_record(folder)
    if start is not None:
        say(f"going on after step {start.facts.step} ({start.folder})")
    elif record is not None and record.status == "interrupted":
        raise RunFolderError(
            f"{folder}: holds a run that was stopped after {record.num_steps} steps, and no "
            "checkpoint to go on from; training from the start would overwrite it. It can be used "
            "as it is (tunefork chat, tunefork evaluate); to train again, give another folder with "
            "--out, or remove this one"
        )
    (folder / RECORD).unlink(missing_ok=True)  # what it tells of is overwritten from here on
