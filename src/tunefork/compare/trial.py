"""One run of one method, from recipe to artefact and evaluation; or of the base, untrained.

`tunefork train` is one trial; `tunefork compare` is a base trial and one for each method and seed.
run.json is written once the artefact is saved, and again once it is evaluated: stopped in between,
by Ctrl-C or an error, the same call goes on at the evaluation. Stopped or killed while it trains,
the same call goes on from the newest checkpoint.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tunefork.compare.check import check_recipe, check_tokens
from tunefork.compare.following import Following, failure, following
from tunefork.data.loader import Data, load_data
from tunefork.errors import BadInputError, RunFolderError
from tunefork.evaluate.evaluate import (
    Evaluation,
    evaluate,
    pad_id,
    plan_evaluation,
    rehearse,
    save_columns,
)
from tunefork.evaluate.statistics import estimate
from tunefork.model.device import describe, pick_device, pick_dtype
from tunefork.model.fingerprint import check_identity, identify, identify_trained
from tunefork.model.identity import Identity
from tunefork.model.load import (
    load_model,
    load_skeleton,
    load_tokenizer,
    without_progress_bars,
)
from tunefork.plan.gate import Prediction, learn, predict
from tunefork.recipe import Method, Recipe
from tunefork.recipe_file import anchor
from tunefork.registry.claim import Claim, claimed
from tunefork.registry.history import remember_run
from tunefork.registry.opening import open_model
from tunefork.registry.peft_format import save_adapter
from tunefork.registry.provenance import (
    Provenance,
    now,
    read_provenance,
    versions,
    write_provenance,
)
from tunefork.registry.run import (
    ADAPTER,
    COLUMNS,
    MODEL,
    RECORD,
    RunRecord,
    folder_bytes,
    read_record,
    write_record,
)
from tunefork.train.checkpoint import sync
from tunefork.train.checkpoints import FOLDER as CHECKPOINTS
from tunefork.train.checkpoints import Found
from tunefork.train.events import EVENTS, read_steps
from tunefork.train.interrupt import Interrupt
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


def train_run(
    recipe: Recipe,
    folder: Path,
    *,
    say: Callable[[str], None] = print,
    ignore_plan: bool = False,
) -> RunRecord:
    """`tunefork train`: the recipe's method in a run folder of its own; `say` gets warnings.

    A run that cannot fit in memory is refused unless `ignore_plan`.

    Ctrl-C ends training after the step at hand and saves what was learnt; the same call goes on
    from there. Raises BadInputError before any training; RunFolderError for a folder with an
    interrupted run whose checkpoints are gone, to overwrite none.
    """
    recipe = anchor(recipe, Path.cwd())
    method = recipe.method
    data = check_recipe(recipe, (method,), say, ignore_plan=ignore_plan)
    with claimed(folder, recipe, Claim(verb="train", data_sha256=data.fingerprint())):
        done = read_record(folder)
        if done is not None and done.status == "ok":
            check_base(done, identify(recipe.model), folder)
            return done
        rate = recipe.learning_rate(method)
        return run_trial(
            recipe, method, folder, seed=recipe.train.seed, learning_rate=rate, say=say
        )


def run_trial(
    recipe: Recipe,
    method: Method | None,
    folder: Path,
    *,
    seed: int,
    learning_rate: float | None,
    keep_interrupted: bool = True,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> RunRecord:
    """Train `method` on all training examples (None: leave the base as it is), save, evaluate.

    What lies trained in `folder` is only evaluated, what lies half trained is gone on with; either
    is refused where the base has changed since. An interrupted run is saved but not evaluated;
    unless `keep_interrupted`, it raises KeyboardInterrupt at once, its checkpoint written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with following(folder, say) as told:
        record = _run(
            recipe,
            method,
            folder,
            told,
            seed=seed,
            learning_rate=learning_rate,
            keep_interrupted=keep_interrupted,
        )
        told.log.state("interrupted" if record.status == "interrupted" else "finished")
        return record


def _run(
    recipe: Recipe,
    method: Method | None,
    folder: Path,
    told: Following,
    *,
    seed: int,
    learning_rate: float | None,
    keep_interrupted: bool,
) -> RunRecord:
    identity = identify(recipe.model)  # before training: a base that cannot be read shows now
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer, is_checked=True)
    record = read_record(folder)
    if record is not None and record.status == "trained":
        check_base(record, identity, folder)
        model = open_model(str(folder), precision=recipe.train.precision).model
    elif method is None:
        dtype = pick_dtype(recipe.train.precision, pick_device())
        model = load_model(recipe.model, dtype=dtype, device=pick_device())
        record = _record(recipe, None, identity, seed=seed)
    else:
        assert learning_rate is not None
        prediction = predict(recipe, method, data.train)
        with _failure_recorded(
            recipe, method, identity, folder, seed=seed, learning_rate=learning_rate
        ):
            model, result = _train(
                recipe,
                method,
                data,
                tokenizer,
                folder,
                told,
                seed=seed,
                learning_rate=learning_rate,
            )
        if result.status == "interrupted" and not keep_interrupted:
            raise KeyboardInterrupt
        record = _record(
            recipe, method, identity, seed=seed, learning_rate=learning_rate, result=result
        )
        if prediction is not None:
            record = _learnt(record, prediction, result)
        told.log.state("saving")
        with phase("save", Remedies.of(recipe, method)):
            record = _save(model, tokenizer, recipe, record, folder, data.fingerprint())
        if record.status == "interrupted":
            return record
        if recipe.train.checkpoints_when_done == "remove":
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    told.log.state("evaluating")
    with phase("evaluation", None if method is None else Remedies.of(recipe, method)):
        evaluation = evaluate(model, tokenizer, data, recipe)
    return _finish(evaluation, recipe, record, folder)


@contextmanager
def _failure_recorded(
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
        steps = read_steps(folder / EVENTS)
        record = _record(recipe, method, identity, seed=seed, learning_rate=learning_rate)
        failed = {
            "status": "failed",
            "error": failure(error),
            "num_steps": steps[-1].step if steps else 0,
            "tokens": steps[-1].tokens if steps else 0,
        }
        with suppress(OSError):  # a full disk: events.jsonl and the exit status say it
            write_record(folder, record.model_copy(update=failed))
        raise


def _train(
    recipe: Recipe,
    method: Method,
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
    checkpoints = open_checkpoints(
        folder / CHECKPOINTS,
        data.train,
        recipe,
        method,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        say=told.say,
    )
    checkpoints.on_written = told.on_written
    start = checkpoints.newest()
    _may_begin(folder, start, told.say)
    told.begin_training(folder, recipe, method, seed=seed, learning_rate=learning_rate, start=start)
    with phase("load", Remedies.of(recipe, method)):
        model = load_for_training(recipe, method, dtype=dtype, device=device, seed=seed)
    done = start.facts.progress() if start else Progress()
    num_steps = len(plan_steps(recipe, len(data.train), seed=seed))
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
            data.train,
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
        )
    return model, result


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
    there = folder_bytes(folder / CHECKPOINTS)
    return Stage(
        folder=folder,
        evaluate=lambda: rehearse(model, tokenizer, data, recipe),
        save=lambda at: _write_artefact(model, tokenizer, recipe, method, at),
        kept=lambda artefact_bytes: max(0, artefact_bytes + num_kept * state_bytes - there),
    )


def _state_bytes_a_value(recipe: Recipe, method: Method, weight_bytes: int) -> int:
    """Of a checkpoint: the weight, both moments, and the master copy where there is one."""
    if method is not Method.FULL:
        return weight_bytes + 8
    moments = 2 if recipe.full.optimizer == "adamw_8bit" else 8
    has_copy = recipe.full.weights == "fp32" and weight_bytes < 4
    return weight_bytes + moments + (4 if has_copy else 0)


def _may_begin(folder: Path, start: Found | None, say: Callable[[str], None]) -> None:
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


def check_base(record: RunRecord, found: Identity, folder: Path) -> None:
    """Raise IdentityError where the base is no longer `found`, what it was when the run began."""
    if record.identity is not None:
        check_identity(record.identity, found, what=str(folder), base=record.model_id)


def _save(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    record: RunRecord,
    folder: Path,
    data_sha256: str,
) -> RunRecord:
    """Write the artefact and its record, which is returned with what it lacked.

    A signal meanwhile is heeded once both are written: it would cost all the training.
    """
    name = MODEL if record.method is Method.FULL else ADAPTER
    assert record.method is not None
    with Interrupt() as interrupt:
        _write_artefact(model, tokenizer, recipe, record.method, folder / name)
        write_provenance(
            folder / name, _provenance(recipe, record, folder / name, tokenizer, data_sha256)
        )
        saved = {
            "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "artifact": name,
            "artifact_bytes": folder_bytes(folder / name),
        }
        record = record.model_copy(update=saved)
        for file in (folder / name).iterdir():  # the checkpoints go once this is on the disk
            sync(file)
        write_record(folder, record)
        remember_run(folder, record)
    if interrupt.requested:
        raise KeyboardInterrupt
    return record


def _provenance(
    recipe: Recipe, record: RunRecord, artifact: Path, tokenizer: Any, data_sha256: str
) -> Provenance:
    """What the artefact, whose weights and tokenizer are written, came from."""
    assert record.identity is not None
    own = identify_trained(artifact, tokenizer) if record.method is Method.FULL else None
    train = recipe.train.model_copy(
        update={"learning_rate": record.learning_rate, "seed": record.seed}
    )
    resolved = recipe.model_copy(update={"method": record.method, "train": train})
    return Provenance(
        identity=record.identity,
        own=own,
        method=record.method,
        recipe=resolved.model_dump(mode="json"),
        data_sha256=data_sha256,
        created=record.created,
        versions=record.versions,
    )


def _write_artefact(
    model: Any, tokenizer: Any, recipe: Recipe, method: Method, target: Path
) -> None:
    if method is Method.FULL:
        with without_progress_bars():
            model.save_pretrained(target)
    else:
        save_adapter(
            model, target, recipe.lora, base=recipe.model.id, revision=recipe.model.revision
        )
    tokenizer.save_pretrained(target)


def _learnt(record: RunRecord, prediction: Prediction, result: TrainResult) -> RunRecord:
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


def _finish(evaluation: Evaluation, recipe: Recipe, record: RunRecord, folder: Path) -> RunRecord:
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
    write_record(folder, record)
    remember_run(folder, record)
    return record


def _record(
    recipe: Recipe,
    method: Method | None,
    identity: Identity,
    *,
    seed: int,
    learning_rate: float | None = None,
    result: TrainResult | None = None,
) -> RunRecord:
    """What is known before anything is saved or evaluated; no `result`: the untrained base."""
    device = pick_device()
    is_interrupted = result is not None and result.status == "interrupted"
    return RunRecord(
        status="interrupted" if is_interrupted else "trained",
        method=method,
        seed=seed,
        learning_rate=learning_rate,
        model_id=recipe.model.id,
        model_revision=recipe.model.revision,
        identity=identity,
        total_params=sum(p.numel() for p in load_skeleton(recipe.model).parameters()),
        trainable_params=0,
        num_steps=0 if result is None else result.num_steps,
        tokens=0 if result is None else result.tokens,
        supervised_tokens=0 if result is None else result.supervised_tokens,
        train_s=0.0 if result is None else result.seconds,
        tokens_per_s=None if result is None else result.tokens / result.seconds,
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


def evaluate_target(
    target: str, recipe: Recipe, *, say: Callable[[str], None] = print
) -> dict[str, tuple[float, float, float]]:
    """Metrics (value, low, high) of a run, adapter or model on the recipe's evaluation examples."""
    opened = open_model(target, precision=recipe.train.precision, say=say)
    data = load_data(recipe, opened.tokenizer)
    plan = plan_evaluation(recipe, data, opened.tokenizer)
    check_tokens(opened.model, recipe, data, plan, opened.tokenizer, say)
    return metric_intervals(evaluate(opened.model, opened.tokenizer, data, recipe), recipe)


def metric_intervals(
    evaluation: Evaluation, recipe: Recipe
) -> dict[str, tuple[float, float, float]]:
    """Value and 95 % interval of every metric that was measured."""
    samples = recipe.evaluate.bootstrap_samples
    found = {m: estimate(m, [evaluation.columns], samples=samples) for m in evaluation.metrics}
    return {metric: (i.value, i.low, i.high) for metric, i in found.items()}
