"""A remembered fingerprint counts only for exactly the files that it was computed from."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tunefork.errors import ModelError
from tunefork.home import home
from tunefork.model.fingerprint_cache import key_of, recall, remember


@pytest.fixture
def fingerprints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test's own, in the place of the session's."""
    return tmp_path_factory.mktemp("fingerprints")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("b", "a")]
    for path in paths:
        path.write_text("content")
    return paths


def _entries() -> list[Path]:
    return list((home() / "fingerprints").iterdir())


def test_what_is_remembered_is_recalled(files: list[Path]) -> None:
    key = key_of(files, "m")
    assert recall("weights", key) is None
    remember("weights", key, "abc", ["5.0"])
    assert recall("weights", key_of(files[::-1], "m"), ["5.0"]) == "abc"
    assert recall("tokenizer", key, ["5.0"]) is None
    assert recall("weights", key, ["5.1"]) is None


def test_files_that_changed_are_not_recalled_and_leave_one_entry(files: list[Path]) -> None:
    remember("weights", key_of(files, "m"), "old")
    was = files[0].stat()
    files[0].write_text("CONTENT")
    os.utime(files[0], ns=(was.st_atime_ns, was.st_mtime_ns))
    key = key_of(files, "m")
    assert recall("weights", key) is None
    remember("weights", key, "new")
    assert recall("weights", key) == "new" and len(_entries()) == 1


def test_a_file_put_in_anothers_place_is_not_recalled(files: list[Path]) -> None:
    remember("weights", key_of(files, "m"), "old")
    files[1].replace(files[0])
    files[0].with_name("a").write_text("content")
    assert recall("weights", key_of(files, "m")) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": null, "value": "x"}'])
def test_a_damaged_entry_is_none(files: list[Path], content: str) -> None:
    key = key_of(files, "m")
    remember("weights", key, "abc")
    (entry,) = _entries()
    entry.write_text(content)
    assert recall("weights", key) is None


def test_an_entry_for_other_files_under_this_name_is_none(files: list[Path]) -> None:
    key = key_of(files, "m")
    remember("weights", key, "abc")
    (entry,) = _entries()
    entry.write_text(entry.read_text().replace(str(files[0]), str(files[0]) + "x"))
    assert recall("weights", key) is None


def test_without_a_place_to_write_nothing_is_remembered(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEFORK_HOME", str(files[0]))  # a file
    key = key_of(files, "m")
    remember("weights", key, "abc")
    assert recall("weights", key) is None


def test_writers_at_once_leave_one_whole_entry(files: list[Path]) -> None:
    key = key_of(files, "m")
    values = {letter * 5000 for letter in "abcdefgh"}

    def work(value: str) -> set[str | None]:
        seen = set()
        for _ in range(40):
            remember("weights", key, value)
            seen.add(recall("weights", key))
        return seen

    with ThreadPoolExecutor(8) as pool:
        seen = set.union(*pool.map(work, values))
    assert seen <= values and len(_entries()) == 1


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="m cannot be read"):
        key_of([tmp_path / "gone"], "m")
