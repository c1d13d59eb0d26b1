"""A save into the run folder's file system, taken away again: seconds, bytes, and room for the run.

An artefact of up to 1 GiB is saved as the run will save it. Of a larger one 256 MiB are written and
the rest is reckoned, because a rehearsal that writes a 70B model costs minutes by itself.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunefork.errors import NoRoomError, is_disk_full

_MOST_WRITTEN = 2**30
_PROBE = 2**28
_SCRATCH = ".rehearsal"


@dataclass(frozen=True, slots=True)
class SaveCost:
    """What one save takes."""

    seconds: float
    bytes: int
    free_bytes: int
    """In the file system, before."""

    def __str__(self) -> str:
        return (
            f"a save takes {self.seconds:.1f} s and {self.bytes / 2**20:.1f} MiB "
            f"({self.free_bytes / 2**30:.1f} GiB free)"
        )


def rehearse_save(
    run: Path, save: Callable[[Path], object], *, trained_bytes: int, kept: Callable[[int], int]
) -> SaveCost:
    """`save` an artefact of about `trained_bytes` into a folder of `run` that goes again.

    Raises NoRoomError where the file system lacks room for what the run keeps: `kept` of the
    artefact's bytes.
    """
    free = shutil.disk_usage(run).free
    _check_room(run, kept(trained_bytes), free)  # before anything is written
    start = time.perf_counter()
    with _scratch(run) as folder:
        try:
            written = _write(folder, save, trained_bytes)
        except Exception as error:
            if not is_disk_full(error):
                raise
            raise NoRoomError(_no_room(run, kept(trained_bytes), free)) from error
        seconds = time.perf_counter() - start
    is_whole = trained_bytes <= _MOST_WRITTEN
    size = written if is_whole else trained_bytes
    _check_room(run, kept(size), free)
    return SaveCost(seconds if is_whole else seconds * size / written, size, free)


def _write(folder: Path, save: Callable[[Path], object], trained_bytes: int) -> int:
    """Bytes written."""
    if trained_bytes <= _MOST_WRITTEN:
        save(folder)
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    with (folder / "probe").open("wb") as stream:
        stream.write(bytes(_PROBE))
        stream.flush()
        os.fsync(stream.fileno())
    return _PROBE


def _check_room(run: Path, needed: int, free: int) -> None:
    if needed > free:
        raise NoRoomError(_no_room(run, needed, free))


def _no_room(run: Path, needed: int, free: int) -> str:
    return (
        f"{run}: rehearsal of the save: the run will keep {needed / 2**20:.1f} MiB there, and its "
        f"file system has {free / 2**20:.1f} MiB free; free some, or give a folder elsewhere with "
        "--out"
    )


@contextmanager
def _scratch(run: Path) -> Iterator[Path]:
    folder = run / _SCRATCH
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
