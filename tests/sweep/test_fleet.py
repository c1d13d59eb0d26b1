"""Who trains, waits and leaves, where signals, kills and sick weights come at the worst moments."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.sweep.solo_group import SoloGroup
from tunefork.recipe import Recipe
from tunefork.recipe_file import load
from tunefork.registry.run import read_record
from tunefork.sweep.group import Stepped
from tunefork.sweep.result import RESULT, SweepResult
from tunefork.sweep.rungs import Rungs
from tunefork.sweep.seat import Seat
from tunefork.sweep.sweep import sweep
from tunefork.trial.trial import train_run

Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def page_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunefork.sweep.sweep.write_report", lambda result, path: None)


@pytest.fixture
def make(make_recipe: Make) -> Make:
    """Two variants of two steps, of which one is dropped after the first."""

    def build(rates: Sequence[float] = (1e-5, 1e-2), **train: Any) -> Recipe:
        return make_recipe(
            train={"max_steps": 2, "batch_size": 2, "warmup_share": 0.0} | train,
            sweep={
                "learning_rate": list(rates),
                "validation_share": 0.3,
                "halving": {"rungs": 1},
            },
        )

    return build


def _sweep(recipe: Recipe, out: Path, group: SoloGroup | None = None) -> SweepResult:
    own = group or SoloGroup()
    return sweep(recipe, out, say=lambda line: None, make_group=lambda recipe, members: own)


def _ends(result: SweepResult) -> list[tuple[str, str, int, float | None]]:
    return [(v.name, v.status, v.num_steps, v.validation_loss) for v in result.variants]


def test_killed_between_a_rungs_state_and_its_figures_it_is_measured_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(Rungs, "reached", dying)
        _sweep(make(), tmp_path / "killed")
    found = _ends(_sweep(make(), tmp_path / "killed"))
    assert [status for _, status, _, _ in found] == ["dropped", "ok"]
    assert found == _ends(_sweep(make(), tmp_path / "whole"))


def test_weights_that_are_not_finite_at_a_rung_are_not_ranked(make: Make, tmp_path: Path) -> None:
    result = _sweep(make((1e38, 1e-2)), tmp_path / "out")
    sick, kept = result.variants
    assert (sick.status, sick.num_steps, kept.status) == ("failed", 1, "ok")
    assert sick.error is not None and "step 1: the loss on the validation examples is" in sick.error
    assert result.chosen == kept.name and kept.rungs[0].place == 1


@pytest.mark.slow
def test_one_that_was_trained_on_alone_holds_nobody_up(make: Make, tmp_path: Path) -> None:
    class Stopping(SoloGroup):
        def step(self) -> Sequence[Stepped]:
            stepped = super().step()
            os.kill(os.getpid(), signal.SIGTERM)
            return stepped

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        _sweep(make(max_steps=4), out, Stopping())
    taken = out / "variants" / "lr1e-2"
    done = train_run(load(taken / "recipe.yaml"), taken, say=lambda line: None)
    assert (done.status, done.num_steps) == ("ok", 4)
    result = _sweep(make(max_steps=4), out)
    assert [(v.status, v.num_steps) for v in result.variants] == [("ok", 4), ("ok", 4)]
    assert result.variants[1].validation_loss == done.validation_loss


@pytest.mark.slow
def test_a_signal_ends_the_first_pass_at_once(make: Make, tmp_path: Path) -> None:
    class Signalled(SoloGroup):
        def step(self) -> Sequence[Stepped]:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("goes on")

    with pytest.raises(KeyboardInterrupt):
        _sweep(make(), tmp_path / "out", Signalled())
    assert read_record(tmp_path / "out" / "variants" / "lr1e-2") is None
    assert [v.status for v in _sweep(make(), tmp_path / "out").variants] == ["dropped", "ok"]


def test_one_that_is_about_to_begin_is_interrupted_like_the_others(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a second Ctrl-C. What an earlier call has left beside it may be of another version."""
    (tmp_path / "out").mkdir()

    def interrupted(*_: object, **__: object) -> None:
        (tmp_path / "out" / RESULT).write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(Seat, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _sweep(make((1e-2,)), tmp_path / "out")


def test_a_signal_cuts_an_evaluation_short_and_the_others_leave_what_they_learnt(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A later pass is ended first, and that is said."""

    def signalled(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("goes on")

    recipe = make(max_steps=2)
    recipe = recipe.model_copy(
        update={
            "sweep": recipe.sweep.model_copy(
                update={"halving": None, "max_steps": (2, 3), "learning_rate": ()}
            )
        }
    )
    out = tmp_path / "out" / "variants"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("tunefork.sweep.seat.evaluate", signalled)
        _sweep(recipe, tmp_path / "out")
    records = [read_record(out / name) for name in ("n2", "n3")]
    assert [(r.status, r.num_steps) for r in records if r] == [("trained", 2), ("interrupted", 2)]
    assert "stopping" not in capfd.readouterr().err

    class Stopping(SoloGroup):
        def step(self) -> Sequence[Stepped]:
            stepped = super().step()
            if len(self.together) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return stepped

    with pytest.raises(KeyboardInterrupt):
        _sweep(recipe, tmp_path / "again", Stopping())
    records = [read_record(tmp_path / "again" / "variants" / name) for name in ("n2", "n3")]
    assert [(r.status, r.num_steps) for r in records if r] == [("interrupted", 2)] * 2
    assert "stopping after the pass at hand" in capfd.readouterr().err
    for where in ("out", "again"):
        assert [v.num_steps for v in _sweep(recipe, tmp_path / where).variants] == [2, 3]
