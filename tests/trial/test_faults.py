"""A run that goes wrong: what it says, what it leaves, and what nobody takes it for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes import rows
from tunefork.errors import DivergedError, NoMemoryError, NoRoomError, RunFolderError
from tunefork.model.load import load_model
from tunefork.recipe import Method, Recipe
from tunefork.registry.opening import open_model
from tunefork.registry.run import ADAPTER, find_runs, read_record
from tunefork.train.events import (
    EVENTS,
    CheckpointSaved,
    SettingChanged,
    StateChanged,
    StepDone,
    read_events,
    read_steps,
)
from tunefork.trial.trial import train_run

Make = Callable[..., Recipe]
SECRET = "confidential"


@pytest.fixture
def long_recipe(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Recipe]:
    """Enough micro-batches to be rehearsed; the last row of the file is much the longest."""
    monkeypatch.setattr("tunefork.train.rehearsal.FEWEST", 6)

    def make(**train: Any) -> Recipe:
        options = {"max_steps": 8, "batch_size": 2, "packing": False} | train
        recipe = make_recipe(train=options, lora={"dropout": 0.1})
        long = {"text": f"{SECRET} " * 5, "label": "dog"}
        lines = [json.dumps(row) for row in (*rows(15), long)]
        Path(recipe.data.train).write_text("\n".join(lines) + "\n")
        return recipe

    return make


def _states(folder: Path) -> list[str]:
    return [e.what.state for e in read_events(folder / EVENTS) if isinstance(e.what, StateChanged)]


def _hooked(monkeypatch: pytest.MonkeyPatch, hook: Callable[[Any], Any]) -> None:
    """`hook` gets every model that is loaded for training."""

    def load(*arguments: Any, **options: Any) -> Any:
        model = load_model(*arguments, **options)
        hook(model)
        return model

    monkeypatch.setattr("tunefork.train.method.load_model", load)


def _room(tokens: int) -> Callable[[Any], None]:
    def hook(model: Any) -> None:
        def check(_: object, given: tuple[torch.Tensor, ...]) -> None:
            if torch.is_grad_enabled() and given[0].numel() > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.get_input_embeddings().register_forward_pre_hook(check)

    return hook


def test_a_sound_run_tells_its_story(long_recipe: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said: list[str] = []
    record = train_run(long_recipe(checkpoint_every_steps=3), folder, say=said.append)
    assert record.status == "ok"
    assert _states(folder) == [
        "preparing",
        "rehearsing",
        "training",
        "saving",
        "evaluating",
        "finished",
    ]
    lines = list(read_events(folder / EVENTS))
    assert [line.seq for line in lines] == list(range(1, len(lines) + 1))
    steps = [line.what for line in lines if isinstance(line.what, StepDone)]
    assert [step.step for step in steps] == list(range(1, 9))
    assert all(step.tokens_per_s > 0 and step.memory_bytes > 0 for step in steps)
    saved = [line.what.step for line in lines if isinstance(line.what, CheckpointSaved)]
    assert saved == [3, 6]
    assert SECRET not in (folder / EVENTS).read_text()
    assert any(line.startswith("rehearsed in ") and "a save takes" in line for line in said)


@pytest.mark.parametrize(  # of each method's training alone: `train/test_rehearsal.py`
    "method",
    [
        Method.LORA,
        pytest.param(Method.QLORA, marks=pytest.mark.slow),
        pytest.param(Method.FULL, marks=pytest.mark.slow),
    ],
)
def test_the_rehearsal_changes_no_bit(long_recipe: Make, tmp_path: Path, method: Method) -> None:
    artefacts = []
    for rehearse in (True, False):
        recipe = long_recipe(rehearse=rehearse).model_copy(update={"method": method})
        folder = tmp_path / str(rehearse)
        train_run(recipe, folder, say=lambda line: None)
        assert ("rehearsing" in _states(folder)) == rehearse
        artefacts.append([f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))])
    assert artefacts[0] == artefacts[1] and artefacts[0]


def test_a_planted_out_of_memory_is_found_before_step_1(
    long_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _hooked(monkeypatch, _room(160))
    folder = tmp_path / "run"
    with pytest.raises(NoMemoryError, match=r"out of memory in the forward pass \(rehearsal of"):
        train_run(long_recipe(), folder, say=lambda line: None)
    assert not read_steps(folder / EVENTS) and _states(folder)[-2:] == ["rehearsing", "failed"]
    # without it, the run falls over where the long row comes
    with pytest.raises(NoMemoryError, match=r"out of memory in the forward pass \(step \d+, "):
        train_run(long_recipe(rehearse=False), tmp_path / "later", say=lambda line: None)
    assert read_steps(tmp_path / "later" / EVENTS)


def test_a_run_may_shrink_its_micro_batches(
    long_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _hooked(monkeypatch, _room(130))
    for rehearse in (True, False):
        folder = tmp_path / str(rehearse)
        recipe = long_recipe(on_out_of_memory="shrink", rehearse=rehearse)
        record = train_run(recipe, folder, say=lambda line: None)
        assert record.status == "ok" and record.num_steps == 8
        changes = [
            e.what for e in read_events(folder / EVENTS) if isinstance(e.what, SettingChanged)
        ]
        assert changes and (changes[0].step == 0) == rehearse


def test_a_full_disk_is_found_before_step_1(
    long_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = __import__("shutil").disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(NoRoomError, match=r"rehearsal of the save: the run will keep .* --out"):
        train_run(long_recipe(), tmp_path / "run", say=lambda line: None)
    assert not read_steps(tmp_path / "run" / EVENTS)


def test_a_diverged_run_is_not_taken_for_a_good_one(
    long_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(model: Any) -> None:
        def hook(_: object, given: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            return out * float("inf") if given[0].shape[-1] > 100 else out

        model.get_input_embeddings().register_forward_hook(hook)

    _hooked(monkeypatch, poison)
    folder, recipe = tmp_path / "run", long_recipe(micro_batch_tokens=256)
    with pytest.raises(DivergedError) as raised:
        train_run(recipe, folder, say=lambda line: None)
    said = str(raised.value)
    assert "Rows whose own loss is not finite: " in said and "train.jsonl:16" in said
    assert SECRET not in said and raised.value.exit_status == 1
    record = read_record(folder)
    assert record is not None and (record.status, record.error) == ("failed", said)
    assert record.num_steps == len(read_steps(folder / EVENTS)) > 0
    [(_, listed)] = find_runs(folder)
    assert listed.status == "failed" and not (folder / ADAPTER).exists()
    assert _states(folder)[-1] == "failed"
    assert (folder / "checkpoints" / f"step-{record.num_steps:06d}").is_dir()
    with pytest.raises(RunFolderError, match="its training failed, and it has no artefact"):
        open_model(str(folder))


def test_bad_weights_are_refused_before_step_1(
    long_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: Any) -> None:
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")

    _hooked(monkeypatch, spoil)
    with pytest.raises(Exception, match=r"down_proj.* 1 of \d+ values that are not finite"):
        train_run(long_recipe(), tmp_path / "run", say=lambda line: None)
