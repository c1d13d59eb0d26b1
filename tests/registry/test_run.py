"""Run folders: whose they are, what they hold, and that a failed write changes nothing."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.registry.conftest import make_record
from tunefork.errors import RunFolderError
from tunefork.registry.run import (
    RECORD,
    find_runs,
    folder_bytes,
    read_record,
    write_atomically,
    write_record,
)


def _content(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, hidden ones too."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# Records


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"status": "trained", "metrics": {}},
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
    with pytest.raises(RunFolderError, match="speed: is not known.*a newer one"):
        read_record(tmp_path)


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


def test_a_foreign_record_is_said_and_left_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, make_record())
    (tmp_path / "b" / RECORD).write_text('{"status": "ok", "secret": "row"}')
    said: list[str] = []
    assert [at.name for at, _ in find_runs(tmp_path, said.append)] == ["a", "c"]
    (line,) = said
    assert line.startswith(f"warning: {tmp_path / 'b' / RECORD}: is not a run's record")
    assert "\n" not in line and "row" not in line and "pydantic" not in line


def test_bytes_of_a_folder_are_those_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "inner" / "b").write_bytes(b"x" * 5)
    assert folder_bytes(tmp_path) == 15
