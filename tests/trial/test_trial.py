"""One run: what it leaves where it is stopped, and that nothing it left is lost."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tunefork.trial.artifact as artifact
import tunefork.trial.training as training
import tunefork.trial.trial as trial
from tests.folders import save_model
from tests.recipes import recipe_in
from tunefork.data.loader import load_data
from tunefork.errors import IdentityError, ModelError, RunFolderError, TuneforkError
from tunefork.model.asked import asked_sha256
from tunefork.model.fingerprint import identify
from tunefork.model.load import load_tokenizer
from tunefork.recipe import Method, Recipe
from tunefork.registry.claim import CLAIM
from tunefork.registry.opening import open_model
from tunefork.registry.peft_format import save_adapter
from tunefork.registry.provenance import read_provenance
from tunefork.registry.run import ADAPTER, COLUMNS, read_record
from tunefork.train.events import EVENTS, read_steps
from tunefork.train.loop import StepRecord
from tunefork.train.method import load_for_training
from tunefork.train.precision import Settled
from tunefork.train.precision_choice import Agreement, BatchAgreement, PrecisionChoice
from tunefork.train.progress import TrainProgress
from tunefork.trial.trial import run_trial, train_run

Make = Callable[..., Recipe]


def _content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def _fail(
    monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException, module: ModuleType = trial
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, name, fail)


def _stop_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_step(self: TrainProgress, record: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainProgress, "on_step", on_step)


def _die_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the run without a state saved."""

    def on_step(self: TrainProgress, record: StepRecord) -> None:
        if record.step == step:
            raise SystemExit

    monkeypatch.setattr(TrainProgress, "on_step", on_step)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes after the first step."""
    _stop_after_each_step(monkeypatch)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        (Method.LORA, TuneforkError("no")),
        (Method.QLORA, KeyboardInterrupt()),
        (Method.FULL, TuneforkError("no")),
    ],
)
def test_what_ends_the_evaluation_costs_no_training(
    make_recipe: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    error: BaseException,
) -> None:
    recipe, folder = make_recipe(method=method), tmp_path / "run"
    whole = train_run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _fail(patch, "evaluate", error)
        with pytest.raises(type(error)):
            train_run(recipe, folder)
    record = read_record(folder)
    assert record is not None and (record.status, record.metrics) == ("trained", {})
    assert open_model(str(folder)).model is not None
    _fail(monkeypatch, "train", AssertionError("trained again"))
    done = train_run(recipe, folder)
    assert done == read_record(folder) and done.status == "ok"
    assert (done.created, done.train_s) == (record.created, record.train_s)
    for metric, interval in done.metrics.items():
        assert interval == pytest.approx(whole.metrics[metric], abs=1e-4), metric
    assert train_run(recipe, folder) == done


@pytest.fixture(scope="module", params=list(Method))
def whole(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    """A recipe, and the folder of its run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = recipe_in(folder, base, method=request.param, lora={"dropout": 0.1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEFORK_HOME", str(folder / "home"))
        train_run(recipe, folder / "whole")
    return recipe, folder / "whole"


def _artefact(folder: Path) -> dict[str, bytes]:
    return {name: b for name, b in _content(folder).items() if name.endswith(".safetensors")}


def _steps(folder: Path) -> list[tuple[object, ...]]:
    """What the steps of a run did, but not how fast."""
    fields = ("step", "tokens", "loss", "learning_rate", "grad_norm")
    return [tuple(getattr(s, f) for f in fields) for s in read_steps(folder / EVENTS)]


def test_an_interrupted_run_is_usable_and_the_same_call_goes_on(
    whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = whole[0], tmp_path / "run"
    said: list[str] = []
    with monkeypatch.context() as patch:
        _stop_after_each_step(patch)
        _fail(patch, "evaluate", AssertionError("evaluated"))
        record = train_run(recipe, folder, say=said.append)
        assert (record.status, record.num_steps, record.metrics) == ("interrupted", 1, {})
        assert record == read_record(folder) and open_model(str(folder)).model is not None
        assert train_run(recipe, folder, say=said.append).num_steps == 2
    (folder / str(record.artifact) / ".tmpQ84qVi").write_bytes(b"")  # a save that was killed
    done = train_run(recipe, folder, say=said.append)
    assert [line.partition(" (")[0] for line in said] == [
        "going on after step 1",
        "going on after step 2",
        "evaluating on 6 examples",
    ]
    uninterrupted = read_record(whole[1])
    assert uninterrupted is not None
    assert "| loss |" in (folder / str(done.artifact) / "README.md").read_text()
    same = ("status", "num_steps", "tokens", "supervised_tokens", "metrics", "artifact_bytes")
    assert [getattr(done, f) for f in same] == [getattr(uninterrupted, f) for f in same]
    assert _artefact(folder) == _artefact(whole[1])
    files = [
        sorted(path.name for path in (f / str(done.artifact)).iterdir()) for f in (folder, whole[1])
    ]
    assert files[0] == files[1]
    assert _steps(folder) == _steps(whole[1])
    assert not (folder / "checkpoints").exists()


def test_ctrl_c_during_the_last_step_is_heeded_once_the_training_is_saved(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = make_recipe(), tmp_path / "run"

    def on_step(self: TrainProgress, record: StepRecord) -> None:
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainProgress, "on_step", on_step)
        _fail(patch, "evaluate", AssertionError("evaluated"))
        with pytest.raises(KeyboardInterrupt):
            train_run(recipe, folder)
    record = read_record(folder)
    assert record is not None and (record.status, record.num_steps) == ("trained", 3)
    _fail(monkeypatch, "train", AssertionError("trained again"))
    assert train_run(recipe, folder).status == "ok"


def test_the_best_state_is_saved_and_said(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(
        train={"validate_every_steps": 1, "validation_share": 0.3, "keep": "best"},
    )
    said: list[str] = []
    record = train_run(recipe, tmp_path / "run", say=said.append)
    assert record.validation_loss is not None
    assert record.artifact_step is None or 1 <= record.artifact_step < record.num_steps
    assert sum("validation loss" in line for line in said) == record.num_steps
    assert any("the best so far" in line for line in said)


def test_what_auto_came_to_is_recorded_told_and_trained_in(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = BatchAgreement(num_examples=1, loss_bf16=1.0, loss_int8=1.0, cosines={})
    agreement = Agreement(batches=(batch,), agrees=True, why="they agree", seconds=1.0)
    choice = PrecisionChoice(precision="int8", why="they agree", agreement=agreement)
    built: list[str] = []

    def as_on_a_gpu(recipe: Recipe, *_: object, **__: object) -> Settled:
        train = recipe.train.model_copy(update={"precision": "int8"})
        return Settled(recipe.model_copy(update={"train": train}), choice)

    def noted(recipe: Recipe, *args: Any, **kwargs: Any) -> Any:
        built.append(recipe.train.precision)
        assert kwargs["examples"]  # int8 products are corrected for
        return load_for_training(recipe, *args, **kwargs)

    monkeypatch.setattr(trial, "settle_precision", as_on_a_gpu)
    monkeypatch.setattr(training, "load_for_training", noted)
    said: list[str] = []
    record = train_run(make_recipe(), tmp_path / "run", say=said.append)
    assert built == ["int8"]
    assert record.precision == choice and read_record(tmp_path / "run") == record
    told = "train.precision: auto is int8: they agree"
    assert told in said and told in (tmp_path / "run" / EVENTS).read_text()


@pytest.mark.parametrize("torn", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(
    whole: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    fields = whole[0].model_dump(mode="json")
    fields["train"] |= {"checkpoint_every_steps": 1}
    recipe, folder = Recipe.model_validate(fields), tmp_path / "run"
    with monkeypatch.context() as patch:
        _die_after(patch, step=3)
        with pytest.raises(SystemExit):
            train_run(recipe, folder)
    assert read_record(folder) is None and len(_steps(folder)) == 3
    with (folder / EVENTS).open("a") as stream:
        stream.write('{"seq": 99, "eve')  # a line that the kill cut short
    said: list[str] = []
    if torn:
        os.truncate(folder / "checkpoints" / "step-000002" / "state.safetensors", 999)
    train_run(recipe, folder, say=said.append)
    last = 1 if torn else 2
    assert said[-2].startswith(f"going on after step {last} ")
    assert torn == any("step-000002/state.safetensors: has 999 bytes, not" in s for s in said)
    assert _artefact(folder) == _artefact(whole[1])
    assert _steps(folder) == _steps(whole[1])


def test_an_interrupted_run_without_its_checkpoints_is_not_overwritten(
    make_recipe: Make, tmp_path: Path, interrupted: None
) -> None:
    recipe, folder = make_recipe(), tmp_path / "run"
    train_run(recipe, folder)
    shutil.rmtree(folder / "checkpoints")
    before = _content(folder)
    with pytest.raises(RunFolderError, match=r"run: holds a run that was stopped after 1 steps.*"):
        train_run(recipe, folder)
    assert _content(folder) == before


@pytest.mark.parametrize("way", ["SIGUSR1", "SIGTERM", "file"])
def test_a_preemption_notice_saves_the_state(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    notice = tmp_path / "notice"

    def on_step(self: TrainProgress, record: object) -> None:
        notice.touch() if way == "file" else os.kill(os.getpid(), getattr(signal, way))

    monkeypatch.setattr(TrainProgress, "on_step", on_step)
    recipe = make_recipe(train={"preemption_file": str(notice), "checkpoint_every_s": None})
    record = train_run(recipe, tmp_path / "run")
    assert (record.status, record.num_steps) == ("interrupted", 1)
    assert (tmp_path / "run" / "checkpoints" / "step-000001" / "manifest.json").is_file()


def test_an_interrupted_piece_of_a_comparison_ends_at_once_and_goes_on(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"seed": 0, "learning_rate": 1e-3, "keep_interrupted": False}
    with monkeypatch.context() as patch:
        _stop_after_each_step(patch)
        _fail(patch, "evaluate", AssertionError("evaluated"))
        with pytest.raises(KeyboardInterrupt):
            run_trial(make_recipe(), Method.LORA, tmp_path, **options)
    assert read_record(tmp_path) is None and not (tmp_path / ADAPTER).exists()
    said: list[str] = []
    assert (
        run_trial(make_recipe(), Method.LORA, tmp_path, say=said.append, **options).num_steps == 3
    )
    assert said[0].startswith("going on after step 1 ")


def test_ctrl_c_while_saving_waits_for_the_record(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save_adapter(*arguments, **options)

    monkeypatch.setattr(artifact, "save_adapter", slow)
    with pytest.raises(KeyboardInterrupt):
        train_run(make_recipe(), tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert record is not None and record.status == "trained"


def test_an_old_record_does_not_outlive_what_it_tells_of(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: None
) -> None:
    options: dict[str, Any] = {"seed": 0, "learning_rate": 1e-3}
    run_trial(make_recipe(), Method.LORA, tmp_path, **options)
    assert read_record(tmp_path) is not None
    _fail(monkeypatch, "train_method", MemoryError(), module=training)
    with pytest.raises(MemoryError):
        run_trial(make_recipe(), Method.LORA, tmp_path, **options)
    record = read_record(tmp_path)
    assert record is not None and (record.status, record.error) == ("failed", "MemoryError")


def test_changed_data_is_not_taken_for_what_was_trained_on(
    make_recipe: Make, tmp_path: Path
) -> None:
    recipe = make_recipe()
    train_run(recipe, tmp_path / "run")
    with Path(recipe.data.train).open("a") as stream:
        stream.write('{"text": "new", "label": "fox"}\n')
    with pytest.raises(RunFolderError, match=r"data\.train, data\.eval or the tokenizer has"):
        train_run(recipe, tmp_path / "run")


def test_the_base_is_evaluated_and_has_no_artefact(make_recipe: Make, tmp_path: Path) -> None:
    record = run_trial(make_recipe(), None, tmp_path, seed=0, learning_rate=None)
    assert (record.status, record.artifact, record.trainable_params) == ("ok", None, 0)
    assert record.metrics and (tmp_path / COLUMNS).is_file()


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A base that the test may change."""
    return Path(shutil.copytree(base, tmp_path / "base"))


@pytest.mark.parametrize("method", list(Method))
def test_a_run_records_its_base_and_its_artefact_too(
    make_recipe: Make, own_base: Path, tmp_path: Path, method: Method
) -> None:
    recipe, run = make_recipe(method=method, model=str(own_base)), tmp_path / "run"
    record = train_run(recipe, run)
    assert record.identity == identify(recipe.model)
    assert record.artifact is not None
    provenance = read_provenance(run / record.artifact)
    assert provenance is not None and provenance.identity == record.identity
    assert (provenance.method, provenance.metrics) == (method, record.metrics)
    claim = json.loads((run / CLAIM).read_text())
    assert provenance.data_sha256 == claim["data_sha256"]
    assert provenance.recipe is not None
    resolved = Recipe.model_validate(provenance.recipe)
    assert resolved.train.learning_rate == record.learning_rate
    assert (resolved.data.format, resolved.data.labels) == ("classification", ("dog", "fox"))
    data = load_data(recipe, load_tokenizer(recipe.model))
    assert provenance.asked_sha256 == asked_sha256(data) is not None
    assert (provenance.own is not None) == (method is Method.FULL)
    open_model(str(run))
    save_model(own_base, seed=1)
    with pytest.raises(IdentityError, match="weights"):
        train_run(recipe, run)
    if method is not Method.FULL:  # which needs its base no more
        with pytest.raises(IdentityError, match="weights"):
            open_model(str(run))


@pytest.mark.parametrize("method", [Method.LORA, Method.FULL])
def test_what_was_trained_on_another_base_is_not_evaluated(
    make_recipe: Make,
    own_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
) -> None:
    recipe, run = make_recipe(method=method, model=str(own_base)), tmp_path / "run"
    with monkeypatch.context() as patch:
        _fail(patch, "evaluate", TuneforkError("no"))
        with pytest.raises(TuneforkError, match="no"):
            train_run(recipe, run)
    save_model(own_base, seed=1)
    with pytest.raises(IdentityError, match=f"{run}: does not belong to {own_base}"):
        train_run(recipe, run)


def test_a_base_that_cannot_be_read_is_found_before_training(
    make_recipe: Make, own_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail(monkeypatch, "train", AssertionError("trained"))
    (own_base / "model.safetensors").rename(own_base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        train_run(make_recipe(model=str(own_base)), tmp_path / "run")
