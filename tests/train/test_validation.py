"""The best state is kept, found again after a stop, and validating changes no step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_loss import examples
from tests.train.test_state import KINDS, checkpoints, run, whole
from tunefork.train.checkpoints import Checkpoints
from tunefork.train.events import Event, Validated, Warned
from tunefork.train.loop import StepRecord
from tunefork.train.state import WEIGHTS, digest
from tunefork.train.validation import Validation

HELD_BACK = examples((7, 5, 13))
LOSSES = [3.0, 2.0, 2.5, 2.0, float("nan"), 4.0, 3.0, 5.0]
"""By step; the best is the second: an equal one later is no better."""


class Killed(Exception):
    """Stands for a kill."""


def validation(events: list[Event], **options: Any) -> Validation:
    """After each step, the best kept, unless told otherwise."""
    fields = {"every": 1, "keep_best": True, "max_tokens": 17, "packing": True, "pad_id": 0}
    return Validation(HELD_BACK, **(fields | options), on_event=events.append)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation losses are `LOSSES`, whatever the model."""

    def measure(self: Validation, model: Any, head: Any, done: Any) -> Any:
        monkeypatch.setattr(Validation, "_loss", lambda *_: LOSSES[done.step - 1])
        return actual(self, model, head, done)

    actual = Validation.measure
    monkeypatch.setattr(Validation, "measure", measure)


def _weights_after(kind: str, step: int, folder: Path) -> str:
    """Hash of a run's weights after `step`, from a run that is stopped there."""
    return digest(run(kind, stop_after=step)[0].tensors, WEIGHTS)


@pytest.mark.parametrize("kind", KINDS)
def test_validating_changes_no_bit(kind: str, tmp_path: Path) -> None:
    events: list[Event] = []
    state, result = run(kind, validation=validation(events, keep_best=False, every=3))
    assert digest(state.tensors) == digest(whole(kind)[0].tensors)
    assert [e.step for e in events if isinstance(e, Validated)] == [3, 6, 8]
    losses = [e.validation_loss for e in events if isinstance(e, Validated)]
    assert result.validation_loss == min(losses) and len(set(losses)) == 3
    assert result.kept_step == 8


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize("kind", ["lora", "full_bf16"])
def test_the_best_state_is_what_a_run_leaves(kind: str, tmp_path: Path) -> None:
    events: list[Event] = []
    saved = checkpoints(tmp_path, every_steps=3, keep=1, keep_best=True)
    state, result = run(kind, saved, validation=validation(events))
    assert (result.kept_step, result.validation_loss, result.num_steps) == (2, 2.0, 8)
    assert digest(state.tensors, WEIGHTS) == _weights_after(kind, 2, tmp_path)
    assert [e.step for e in events if isinstance(e, Validated) and e.is_best] == [1, 2]
    kept = sorted(path.name for path in saved.folder.iterdir())
    assert kept == ["step-000002", "step-000006"]  # the best, and the newest


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_stopped_run_finds_its_best_again(cut: int, tmp_path: Path) -> None:
    def on_step(record: StepRecord) -> None:
        if record.step == cut + 1:
            raise Killed

    def saved() -> Checkpoints:
        return checkpoints(tmp_path, every_steps=1, keep=1, keep_best=True)

    with pytest.raises(Killed):
        run("lora", saved(), validation=validation([]), on_step=on_step)
    state, result = run("lora", saved(), validation=validation([]))
    assert (result.kept_step, result.validation_loss) == (2, 2.0)
    assert digest(state.tensors, WEIGHTS) == _weights_after("lora", 2, tmp_path)


@pytest.mark.usefixtures("planned")
def test_a_damaged_best_state_is_said_and_the_last_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    saved = checkpoints(tmp_path, every_steps=3, keep_best=True)

    def on_step(record: StepRecord) -> None:
        if record.step == 8:
            (saved.folder / "step-000002" / "state.safetensors").write_bytes(b"torn")

    state, result = run("lora", saved, validation=validation(events), on_step=on_step)
    assert result.kept_step == 8
    assert digest(state.tensors, WEIGHTS) == digest(whole("lora")[0].tensors, WEIGHTS)
    assert [e.code for e in events if isinstance(e, Warned)] == ["checkpoint"]


def test_an_interrupted_run_leaves_its_last_state(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, every_steps=3, keep_best=True)
    _, result = run("lora", saved, validation=validation([]), stop_after=4)
    assert (result.status, result.kept_step) == ("interrupted", 4)
    found = saved.newest()
    assert found is not None and found.facts.step == 4
    assert replace(found.facts.progress(), seconds=0.0).best_loss is not None
