"""Whose a folder is, and that a refused claim leaves no trace."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.registry.conftest import CLAIM, make_record
from tunefork.errors import RecipeError, RunFolderError
from tunefork.recipe import Recipe
from tunefork.recipe_file import load, parse
from tunefork.registry.claim import CLAIM as CLAIM_FILE
from tunefork.registry.claim import LOCK, Claim, claimed
from tunefork.registry.run import RECIPE, write_record


def _recipe(tmp_path: Path, **sections: Any) -> Recipe:
    rows = {"train": str(tmp_path / "rows.jsonl")}
    return parse({"model": "owner/name", "data": rows} | sections)


def _content(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, hidden ones too."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def _claim(folder: Path, recipe: Recipe, claim: Claim = CLAIM) -> None:
    with claimed(folder, recipe, claim):
        pass


def test_a_claimed_folder_holds_the_recipe_and_may_be_claimed_again(tmp_path: Path) -> None:
    recipe, folder = _recipe(tmp_path), tmp_path / "deep" / "run"
    _claim(folder, recipe)
    assert set(_content(folder)) == {RECIPE, CLAIM_FILE, LOCK} and load(folder / RECIPE) == recipe
    (folder / "steps.jsonl").write_text("{}\n")
    before = _content(folder)
    _claim(folder, recipe)
    assert _content(folder) == before


@pytest.mark.parametrize("left", [[], [LOCK]])
def test_an_empty_folder_may_be_claimed(tmp_path: Path, left: list[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in left:
        (folder / name).touch()
    _claim(folder, _recipe(tmp_path))
    assert (folder / RECIPE).is_file()


@pytest.mark.parametrize(
    "other", [{"lora": {"rank": 4}}, {"train": {"seed": 1}}, {"model": "owner/other"}]
)
def test_another_recipes_run_is_left_untouched(tmp_path: Path, other: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    _claim(folder, _recipe(tmp_path))
    write_record(folder, make_record())
    before = _content(folder)
    with pytest.raises(RunFolderError, match=r"holds a run of another recipe .*--out"):
        _claim(folder, _recipe(tmp_path, **other))
    assert _content(folder) == before


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"verb": "compare"}, "holds what tunefork train made .* tunefork compare would mix"),
        ({"data_sha256": "1" * 64}, "data.train, data.eval or the tokenizer has changed"),
    ],
)
def test_another_verb_and_other_data_are_refused(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    _claim(tmp_path / "run", _recipe(tmp_path))
    before = _content(tmp_path)
    with pytest.raises(RunFolderError, match=rf"run: {message}.*--out"):
        _claim(tmp_path / "run", _recipe(tmp_path), CLAIM.model_copy(update=other))
    assert _content(tmp_path) == before


def test_what_is_no_run_folder_is_left_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("mine")
    for place in (folder, folder / "chapter.txt"):
        with pytest.raises(RunFolderError, match=r"exists and is no run folder; give an empty"):
            _claim(place, _recipe(tmp_path))
    assert _content(folder) == {"chapter.txt": b"mine"}


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"cannot be written: .*Not a directory"):
        _claim(tmp_path / "file" / "run", _recipe(tmp_path))
    with pytest.raises(RunFolderError, match=r"cannot be written: .*too long"):
        _claim(tmp_path / ("x" * 300), _recipe(tmp_path))


def test_a_broken_recipe_or_claim_in_the_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _claim(folder, _recipe(tmp_path))
    (folder / CLAIM_FILE).write_text("{}")
    with pytest.raises(RunFolderError, match=r"run/claim\.json: is not a run folder's claim"):
        _claim(folder, _recipe(tmp_path))
    (folder / RECIPE).write_text("model: [")
    with pytest.raises(RecipeError, match=r"run/recipe\.yaml:1: is not YAML"):
        _claim(folder, _recipe(tmp_path))


def test_a_claim_on_a_full_disk_may_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):  # a failure, not bad input
        _claim(tmp_path / "run", _recipe(tmp_path))
    monkeypatch.undo()
    _claim(tmp_path / "run", _recipe(tmp_path))
    assert set(_content(tmp_path / "run")) == {RECIPE, CLAIM_FILE, LOCK}


# One at a time


def test_a_folder_is_held_by_one_and_free_afterwards(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", _recipe(tmp_path)
    busy = pytest.raises(RunFolderError, match=r"run: another tunefork is at work in this folder")
    with claimed(folder, recipe, CLAIM), busy:
        _claim(folder, recipe)
    _claim(folder, recipe)
    with pytest.raises(RuntimeError), claimed(folder, recipe, CLAIM):
        raise RuntimeError
    _claim(folder, recipe)


def test_a_child_that_inherits_the_lock_holds_the_folder_too(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", _recipe(tmp_path)
    wait = [sys.executable, "-c", "input()"]
    with claimed(folder, recipe, CLAIM) as lock:
        child = subprocess.Popen(wait, stdin=subprocess.PIPE, pass_fds=(lock,))
    with child, pytest.raises(RunFolderError, match="another tunefork is at work"):
        _claim(folder, recipe)
    _claim(folder, recipe)
