"""The order of work: what is kept, what a failing piece costs, and who may work in a folder.

Pieces run in this process here; `test_worker.py` starts real ones.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tunefork.compare.compare as module
from tests.folders import save_model
from tunefork.compare import worker
from tunefork.compare.compare import COMPARISON, check, compare
from tunefork.compare.worker import Failure
from tunefork.errors import (
    BadInputError,
    DataError,
    IdentityError,
    RecipeError,
    RunFolderError,
    TuneforkError,
)
from tunefork.recipe import Recipe
from tunefork.registry.run import read_record, write_record
from tunefork.trial import trial
from tunefork.trial.trial import train_run

Make = Callable[..., Recipe]


class Pieces:
    """Stands for `worker.start`: runs a piece here, or fails it as told."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failures: dict[str, Failure] = {}
        self.meanwhile: Callable[[], object] = lambda: None

    def start(self, folder: Path, *task: str, lock: int) -> Failure | None:
        name = " ".join(task[:2])
        self.done.append(name)
        self.meanwhile()
        if name in self.failures:
            return self.failures[name]
        assert worker.main([str(folder), *task]) == 0
        return None


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    pieces = Pieces()
    monkeypatch.setattr(module, "start", pieces.start)
    return pieces


BAD = Failure("model.id: cannot be quantised", is_bad_input=True)


def test_late_bad_input_is_its_arms_own_failure(
    make_recipe: Make, tmp_path: Path, pieces: Pieces
) -> None:
    pieces.failures = {"train qlora": BAD}
    said: list[str] = []
    comparison = compare(make_recipe(), tmp_path / "out", say=said.append)
    found = {arm: result.status for arm, result in comparison.methods.items()}
    assert found == {"base": "ok", "lora": "ok", "qlora": "failed", "full": "ok"}
    assert comparison.methods["qlora"].error == f"seed 0: {BAD.message}"
    assert f"qlora: failed: {BAD.message}" in said
    assert json.loads((tmp_path / "out" / COMPARISON).read_text())["methods"]["full"]


def test_a_failed_search_is_said(make_recipe: Make, tmp_path: Path, pieces: Pieces) -> None:
    pieces.failures = {"search lora": Failure("out of memory")}
    recipe = make_recipe(compare={"search_trials": 2, "methods": ["lora"]})
    said: list[str] = []
    comparison = compare(recipe, tmp_path / "out", say=said.append)
    assert said[-1] == "lora: learning-rate search: failed: out of memory"
    assert comparison.methods["lora"].error == "learning-rate search: out of memory"


def test_bad_input_to_the_first_piece_ends_the_comparison(
    make_recipe: Make, tmp_path: Path, pieces: Pieces
) -> None:
    pieces.failures = {"base": BAD}
    with pytest.raises(BadInputError, match=BAD.message):
        compare(make_recipe(), tmp_path / "out", say=lambda _: None)
    assert pieces.done == ["base"]


def test_nothing_succeeded(make_recipe: Make, tmp_path: Path, pieces: Pieces) -> None:
    pieces.failures = {name: Failure("killed") for name in ("base", "train lora")}
    recipe = make_recipe(compare={"methods": ["lora"]})
    with pytest.raises(TuneforkError, match="nothing succeeded:\nbase: killed\nlora: seed 0: kil"):
        compare(recipe, tmp_path / "out", say=lambda _: None)


def test_what_is_done_is_kept_and_what_is_trained_only_evaluated(
    make_recipe: Make, tmp_path: Path, pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = make_recipe(compare={"methods": ["lora"]}), tmp_path / "out"

    compare(recipe, out, say=lambda _: None)
    pieces.done.clear()
    record = read_record(out / "lora" / "seed-0")
    assert record is not None
    unfinished = record.model_copy(update={"status": "trained", "metrics": {}})
    write_record(out / "lora" / "seed-0", unfinished)

    def train(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(trial, "train", train)
    said: list[str] = []
    comparison = compare(recipe, out, say=said.append)
    assert said == [
        "base: measured before, kept",
        "lora: seed 0 trained before, kept; evaluating it",
    ]
    assert pieces.done == ["train lora"] and comparison.methods["lora"].status == "ok"
    again = read_record(out / "lora" / "seed-0")
    assert again is not None and again.created == record.created


@pytest.mark.parametrize("lost", ["", "base/run.json"])
def test_what_was_measured_on_another_base_is_not_mixed_in(
    make_recipe: Make, base: Path, tmp_path: Path, pieces: Pieces, lost: str
) -> None:
    own = shutil.copytree(base, tmp_path / "base")
    recipe, out = make_recipe(model=str(own), compare={"methods": ["lora"]}), tmp_path / "out"
    compare(recipe, out, say=lambda _: None)
    save_model(own, seed=1)
    if lost:
        (out / lost).unlink()
    with pytest.raises(IdentityError, match=rf"out/.*: does not belong to {own} .* weights"):
        compare(recipe, out, say=lambda _: None)


# Before anything is trained


def test_a_split_that_cannot_be_searched_on_is_found_first(make_recipe: Make) -> None:
    searched = {"search_trials": 2, "validation_share": 0.99}
    with pytest.raises(DataError, match=r"too few to cut a validation share of 0\.99 off"):
        check(make_recipe(compare=searched), lambda _: None)
    check(make_recipe(compare=searched | {"search_trials": 1}), lambda _: None)


def test_one_rate_for_every_method_is_refused(make_recipe: Make) -> None:
    with pytest.raises(
        RecipeError, match=r"train\.learning_rate: 0\.0003 .*compare\.learning_rates"
    ):
        check(make_recipe(train={"learning_rate": 3e-4}), lambda _: None)


# Whose folder it is


def test_a_comparisons_folder_is_not_trained_into(
    make_recipe: Make, tmp_path: Path, pieces: Pieces
) -> None:
    recipe, out = make_recipe(compare={"methods": ["lora"]}), tmp_path / "out"
    compare(recipe, out, say=lambda _: None)
    before = sorted(out.rglob("*"))
    with pytest.raises(RunFolderError, match="out: holds what tunefork compare made"):
        train_run(recipe, out)
    assert sorted(out.rglob("*")) == before
    train_run(recipe, tmp_path / "run")
    with pytest.raises(RunFolderError, match="run: holds what tunefork train made"):
        compare(recipe, tmp_path / "run")


def test_two_comparisons_do_not_share_a_folder(
    make_recipe: Make, tmp_path: Path, pieces: Pieces
) -> None:
    recipe, out = make_recipe(compare={"methods": ["lora"]}), tmp_path / "out"

    def second() -> None:
        with pytest.raises(RunFolderError, match="out: another tunefork is at work"):
            compare(recipe, out, say=lambda _: None)

    pieces.meanwhile = second
    compare(recipe, out, say=lambda _: None)
    assert pieces.done == ["base", "train lora"]
