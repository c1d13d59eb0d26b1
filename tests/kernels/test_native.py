"""A kernel in C is compiled once, by whoever's cache it is, and done without where that fails."""

import ctypes
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tunefork.kernels import native

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("gcc") or shutil.which("cc")),
    reason="needs a compiler",
)
_SOURCE = """
#include <stdint.h>
#ifndef BY
#define BY 2
#endif
#include <omp.h>
int64_t times(int64_t number) { return BY * number; }
int64_t threads(void) { return omp_get_max_threads(); }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of one.c, which is where `library` looks; its cache is in there too."""
    (tmp_path / "one.c").write_text(_SOURCE)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setenv("TUNEFORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def _made(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "kernels").iterdir())


def test_it_is_compiled_once_for_each_definition(folder: Path) -> None:
    for definitions, result in (((), 10), (("BY=3",), 15)):
        library = native.library("one", *definitions)
        assert library is not None and library.times(5) == result
    made = _made(folder)
    assert len(made) == 2  # and nothing half done
    native.library.cache_clear()
    before = [file.stat().st_mtime_ns for file in made]
    assert native.library("one") is not None
    assert [file.stat().st_mtime_ns for file in _made(folder)] == before


def test_it_is_compiled_again_when_its_source_has_changed(folder: Path) -> None:
    assert native.library("one") is not None
    (folder / "one.c").write_text(_SOURCE.replace("BY 2", "BY 7"))
    native.library.cache_clear()
    library = native.library("one")
    assert library is not None and library.times(5) == 35


def test_its_threads_are_pytorchs(folder: Path) -> None:
    """One OpenMP in the process, which has been told how many."""
    library = native.library("one")
    assert library is not None
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert library.threads() == count
    finally:
        torch.set_num_threads(before)
    maps = Path("/proc/self/maps").read_text()
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) <= 1


def test_what_others_may_have_written_is_not_loaded(folder: Path) -> None:
    assert native.library("one") is not None
    (made,) = _made(folder)
    made.unlink()  # it is in use here
    made.write_bytes(b"not a library")
    made.chmod(0o777)
    native.library.cache_clear()
    library = native.library("one")
    assert library is not None and library.times(1) == 2


@pytest.mark.parametrize(
    ("compiler", "source", "said"),
    [
        ("no-such-compiler", _SOURCE, "there is no compiler (no-such-compiler)"),
        ("", "int wrong(", "error"),
        ("false", _SOURCE, "returned non-zero exit status 1"),
    ],
)
def test_without_one_the_log_says_why(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    compiler: str,
    source: str,
    said: str,
) -> None:
    monkeypatch.setenv("CC", compiler)
    (folder / "one.c").write_text(source)
    with caplog.at_level(logging.WARNING):
        assert native.library("one") is None
    (record,) = caplog.records
    assert said in record.getMessage() and "one.c is not used" in record.getMessage()


def test_pytorch_without_openmp_has_no_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert native.library("one") is None
    assert "built without OpenMP" in caplog.text
