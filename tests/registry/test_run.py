"""Run folders: whose they are, what they hold, and that a failed write changes nothing."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.registry.conftest import make_record
from tunefork.errors import RecipeError, RunFolderError
from tunefork.recipe import Recipe, load, parse
from tunefork.registry.run import (
    RECIPE,
    RECORD,
    claim,
    find_runs,
    folder_bytes,
    read_record,
    write_atomically,
    write_record,
)


def _recipe(tmp_path: Path, **sections: Any) -> Recipe:
    rows = {"train": str(tmp_path / "rows.jsonl")}
    return parse({"model": "owner/name", "data": rows} | sections)


def _content(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, hidden ones too."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# Records


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"status": "interrupted", "method": "full", "artifact": "model", "model_revision": "v2"},
        {"method": None, "learning_rate": None, "peak_memory_bytes": None, "artifact": None},
    ],
)
def test_a_record_is_read_as_it_was_written(tmp_path: Path, fields: dict[str, Any]) -> None:
    record = make_record(**fields)
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert list(_content(tmp_path)) == [RECORD]


def test_a_folder_without_a_record_is_unfinished(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    assert read_record(tmp_path / "gone") is None


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"status": "ok"}', b"\xff\xfe"])
def test_a_broken_record_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / RECORD).write_bytes(text)
    with pytest.raises(RunFolderError, match=r"run\.json: is not a run's record; move it"):
        read_record(tmp_path)


def test_a_record_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    text = make_record().model_dump_json().replace('"seed":0', '"seed":0,"speed":1')
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(RunFolderError, match="speed"):
        read_record(tmp_path)


# Claims


def test_a_claimed_folder_holds_the_recipe_and_may_be_claimed_again(tmp_path: Path) -> None:
    recipe, folder = _recipe(tmp_path), tmp_path / "deep" / "run"
    claim(folder, recipe)
    assert list(_content(folder)) == [RECIPE] and load(folder / RECIPE) == recipe
    (folder / "steps.jsonl").write_text("{}\n")
    before = _content(folder)
    claim(folder, recipe)
    assert _content(folder) == before


def test_an_empty_folder_may_be_claimed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    claim(folder, _recipe(tmp_path))
    assert (folder / RECIPE).is_file()


@pytest.mark.parametrize(
    "other", [{"lora": {"rank": 4}}, {"train": {"seed": 1}}, {"model": "owner/other"}]
)
def test_another_recipes_run_is_left_untouched(tmp_path: Path, other: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    claim(folder, _recipe(tmp_path))
    write_record(folder, make_record())
    before = _content(folder)
    with pytest.raises(RunFolderError, match=r"holds a run of another recipe .*--out"):
        claim(folder, _recipe(tmp_path, **other))
    assert _content(folder) == before


def test_what_is_no_run_folder_is_left_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("mine")
    for place in (folder, folder / "chapter.txt"):
        with pytest.raises(RunFolderError, match=r"exists and is no run folder; give an empty"):
            claim(place, _recipe(tmp_path))
    assert _content(folder) == {"chapter.txt": b"mine"}


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"cannot be written: .*Not a directory"):
        claim(tmp_path / "file" / "run", _recipe(tmp_path))
    with pytest.raises(RunFolderError, match=r"cannot be written: .*too long"):
        claim(tmp_path / ("x" * 300), _recipe(tmp_path))


def test_a_broken_recipe_in_the_folder_is_named(tmp_path: Path) -> None:
    claim(tmp_path / "run", _recipe(tmp_path))
    (tmp_path / "run" / RECIPE).write_text("model: [")
    with pytest.raises(RecipeError, match=r"run/recipe\.yaml:1: is not YAML"):
        claim(tmp_path / "run", _recipe(tmp_path))


# Writing


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_text_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    file = tmp_path / "file.json"
    write_atomically(file, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if fails == "fsync" else Path, fails, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert _content(tmp_path) == {"file.json": b"old"}
    monkeypatch.undo()
    write_atomically(file, "new")
    assert _content(tmp_path) == {"file.json": b"new"}


def test_a_claim_on_a_full_disk_may_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):  # a failure, not bad input
        claim(tmp_path / "run", _recipe(tmp_path))
    monkeypatch.undo()
    claim(tmp_path / "run", _recipe(tmp_path))
    assert list(_content(tmp_path / "run")) == [RECIPE]


# Finding


def test_finished_runs_are_found_at_any_depth_in_order(tmp_path: Path) -> None:
    for name in ("b", "a/lora/seed-0", "a/base"):
        (tmp_path / name).mkdir(parents=True)
        write_record(tmp_path / name, make_record(seed=len(name)))
    (tmp_path / "unfinished").mkdir()
    found = find_runs(tmp_path)
    assert [str(at.relative_to(tmp_path)) for at, _ in found] == ["a/base", "a/lora/seed-0", "b"]
    assert [record.seed for _, record in found] == [6, 13, 1]
    assert find_runs(tmp_path / "gone") == []


def test_a_broken_record_is_reported_not_left_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, make_record())
    (tmp_path / "b" / RECORD).write_text("{")
    with pytest.raises(RunFolderError, match=r"b/run\.json: is not a run's record"):
        find_runs(tmp_path)


def test_bytes_of_a_folder_are_those_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "inner" / "b").write_bytes(b"x" * 5)
    assert folder_bytes(tmp_path) == 15
