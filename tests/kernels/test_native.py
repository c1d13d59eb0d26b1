"""A kernel in C is compiled once, by whoever's cache it is, and done without where that fails."""

import ctypes
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
extern int omp_get_max_threads(void);
void times(int64_t *number) { *number *= BY; }
void threads(int64_t *number) { *number = omp_get_max_threads(); }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of one.c, which is where native.py looks; its cache is in there too."""
    (tmp_path / "one.c").write_text(_SOURCE)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setenv("TUNEFORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run."""
    found: list[list[str]] = []

    def run(command: list[str]) -> None:
        found.append(command)
        _RUN(command)

    monkeypatch.setattr(native, "_run", run)
    return found


_RUN = native._run


def _asked(symbol: str = "times", *definitions: str) -> Callable[..., None] | None:
    return native.function("one", symbol, [ctypes.c_void_p], definitions)


def _called(function: Callable[..., None] | None, number: int = 5) -> int:
    assert function is not None
    given = ctypes.c_int64(number)
    function(ctypes.byref(given))
    return given.value


def _made(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "kernels").iterdir())


def test_it_is_compiled_once_for_each_definition(folder: Path, compiled: list[Any]) -> None:
    assert _called(_asked()) == 10 and _called(_asked("times", "BY=3")) == 15
    assert len(_made(folder)) == 2 and len(compiled) == 4  # and nothing half done
    assert _called(_asked()) == 10 and len(compiled) == 4


def test_it_is_compiled_again_for_another_source_and_another_compiler(
    folder: Path, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _called(_asked()) == 10
    (folder / "one.c").write_text(_SOURCE.replace("BY 2", "BY 7"))
    assert _called(_asked()) == 35
    own = folder / "own-gcc"
    own.write_text(f'#!/bin/sh\nexec {native._compiler()[0]} "$@"\n')
    own.chmod(0o755)
    monkeypatch.setenv("CC", f"{own} -DBY=9")
    assert _called(_asked()) == 45
    own.write_text(own.read_text() + "# another version\n")
    assert _called(_asked()) == 45 and len(compiled) == 8


def test_its_threads_are_pytorchs(folder: Path) -> None:
    """One OpenMP in the process, which has been told how many."""
    threads = _asked("threads")
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert _called(threads) == count
    finally:
        torch.set_num_threads(before)
    maps = Path("/proc/self/maps").read_text()
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) <= 1


def test_threads_that_come_together_compile_once(folder: Path, compiled: list[Any]) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda _: _called(_asked()), range(4))] == [10] * 4
    assert len(compiled) == 2


def test_what_others_may_have_written_is_compiled_anew(folder: Path, compiled: list[Any]) -> None:
    assert _called(_asked()) == 10
    (made,) = _made(folder)
    made.unlink()  # it is in use here
    made.write_bytes(b"not a library")
    made.chmod(0o777)
    assert _called(_asked()) == 10 and len(compiled) == 4


def test_half_a_file_is_compiled_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "_compile", lambda source, made, *_: made.write_bytes(b"half"))
        assert _asked() is None
    (made,) = _made(folder)
    assert made.read_bytes() == b"half"
    assert _called(_asked()) == 10


@pytest.mark.parametrize("fault", ["of others", "a file", "no home"])
def test_without_a_folder_of_ones_own_nothing_is_kept(
    folder: Path, compiled: list[Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = folder / "cache" / "kernels"
    if fault == "of others":
        kernels.mkdir(parents=True)
        kernels.chmod(0o777)
    elif fault == "a file":
        kernels.parent.mkdir()
        kernels.write_text("")
    else:

        def no_home(self: Path) -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "expanduser", no_home)
    assert _called(_asked()) == 10 and len(compiled) == 2
    assert not kernels.is_dir() or not _made(folder)
    assert _called(_asked()) == 10 and len(compiled) == 4


def test_a_group_that_may_write_by_default_changes_nothing(
    folder: Path, compiled: list[Any]
) -> None:
    before = os.umask(0o002)
    try:
        assert _called(_asked()) == 10 == _called(_asked()) and len(compiled) == 2
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("compiler", "source", "said"),
    [
        ("no-such-compiler -O1", _SOURCE, "there is no compiler (no-such-compiler -O1)"),
        ("gcc '", _SOURCE, "No closing quotation"),
        ("", "int wrong(", "error"),
        ("", "#error it is no gain here", "it is no gain here"),
        ("false", _SOURCE, "false ended with 1"),
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
        assert _asked() is None
    (record,) = caplog.records
    assert said in record.getMessage() and "one.c is not used" in record.getMessage()
    assert not _made(folder) if (folder / "cache").exists() else True


def test_a_compiler_that_does_not_end_is_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own, told = folder / "own-cc", folder / "child"
    own.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {told}\nwait\n")
    own.chmod(0o755)
    monkeypatch.setenv("CC", str(own))
    monkeypatch.setattr(native, "_LIMIT_S", 0.3)
    assert _asked() is None
    assert "was not done after 0 s" in caplog.text
    child = int(told.read_text())
    for _ in range(100):  # until its own parent has seen that it ended
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("what the compiler had started runs on")


def test_pytorch_without_openmp_and_other_systems_have_no_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda _: object())
        assert _asked() is None
    assert "built without OpenMP" in caplog.text
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _asked() is None
    assert "not made for darwin" in caplog.text
