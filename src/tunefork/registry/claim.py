"""Whose a folder is: one recipe's, one verb's, one data set's, and one process's at a time.

recipe.yaml says which recipe's, claim.json the verb and the data. What lies in a folder is then
never mixed with what another command makes. While a process is at work in a folder it holds a lock
(flock on .lock), and so does each child that inherits the lock's descriptor: a second command on
the same folder is refused even where the first one was killed and its child still writes.
"""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict

from tunefork.errors import RunFolderError, is_disk_full
from tunefork.recipe import Recipe
from tunefork.recipe_file import dump, load
from tunefork.registry.run import RECIPE, read_json, write_atomically

CLAIM = "claim.json"
LOCK = ".lock"


class Claim(BaseModel):
    """What a folder is for, beside its recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    verb: Literal["train", "compare", "sweep", "train-many"]
    data_sha256: str
    """`Data.fingerprint` of what was begun with; empty where each run below has its own."""


@contextmanager
def claimed(folder: Path, recipe: Recipe, claim: Claim) -> Iterator[int]:
    """Make `folder` this recipe's and hold it alone while entered; yields the lock's descriptor.

    A process that inherits the descriptor holds the folder for as long as it lives. Raises
    RunFolderError where the folder holds something else or is in use, and leaves it untouched.
    """
    with _as_run_folder_error(folder):
        _check_claim(folder, recipe, claim)  # before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    with lock:
        with _as_run_folder_error(folder):
            _lock(lock, folder)
            _check_claim(folder, recipe, claim)  # another process may have been there first
            if not (folder / RECIPE).exists():
                write_atomically(folder / RECIPE, dump(recipe))
            if not (folder / CLAIM).exists():
                write_atomically(folder / CLAIM, claim.model_dump_json(indent=2) + "\n")
        yield lock.fileno()


@contextmanager
def held(folder: Path, verb: Literal["train-many"]) -> Iterator[int]:
    """Hold `folder` alone for a verb whose runs, each with a recipe and a claim of its own, lie
    below it; as `claimed` else."""
    with _as_run_folder_error(folder):
        _check_verb(folder, verb)
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    with lock:
        with _as_run_folder_error(folder):
            _lock(lock, folder)
            _check_verb(folder, verb)
            if not (folder / CLAIM).exists():
                claim = Claim(verb=verb, data_sha256="")
                write_atomically(folder / CLAIM, claim.model_dump_json(indent=2) + "\n")
        yield lock.fileno()


def _check_verb(folder: Path, verb: str) -> None:
    if not (folder / CLAIM).exists():
        if folder.exists() and (
            not folder.is_dir() or any(p.name != LOCK for p in folder.iterdir())
        ):
            raise RunFolderError(
                f"{folder}: exists and is no folder of tunefork {verb}; give an empty or new "
                "folder with --out"
            )
        return
    found = read_json(Claim, folder / CLAIM, "is not a run folder's claim; remove the folder")
    if found.verb != verb:
        raise RunFolderError(
            f"{folder}: holds what tunefork {found.verb} made, and tunefork {verb} would mix with "
            "it; give another folder with --out"
        )


@contextmanager
def _as_run_folder_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_disk_full(error):  # no fault of the name that was given
            raise
        raise RunFolderError(f"{folder}: cannot be written: {error}") from error


def _lock(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunFolderError(
            f"{folder}: another tunefork is at work in this folder; wait until it has ended, or "
            "give another folder with --out"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        # Some cluster file systems have no locks: better unguarded there than not at all.


def _check_claim(folder: Path, recipe: Recipe, claim: Claim) -> None:
    """Raise RunFolderError unless `folder` is new, empty, or has the same recipe and claim."""
    file = folder / RECIPE
    if not file.exists():
        if folder.exists() and (
            not folder.is_dir() or any(p.name != LOCK for p in folder.iterdir())
        ):
            raise RunFolderError(
                f"{folder}: exists and is no run folder; give an empty or new folder with --out"
            )
        return
    if load(file) != recipe:
        raise RunFolderError(
            f"{folder}: holds a run of another recipe ({file}); give another folder with "
            "--out, or remove this one"
        )
    if not (folder / CLAIM).exists():  # stopped between the two files: nothing else is there
        return
    held = read_json(Claim, folder / CLAIM, "is not a run folder's claim; remove the folder")
    if held.verb != claim.verb:
        raise RunFolderError(
            f"{folder}: holds what tunefork {held.verb} made of this recipe, and tunefork "
            f"{claim.verb} would mix with it; give another folder with --out"
        )
    if held.data_sha256 != claim.data_sha256:
        raise RunFolderError(
            f"{folder}: data.train, data.eval or the tokenizer has changed since the work in this "
            "folder began, and what is done would not go with what is not; give another folder "
            "with --out, or remove this one"
        )
