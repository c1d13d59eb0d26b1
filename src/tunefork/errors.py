"""How a run may fail, and the exit status each way has.

Bad input is the user's to mend (exit status 2); everything else that goes wrong is a failure of
the run (exit status 1). Messages say where the fault is (field or file:line), what was found, what
is allowed and what to do next. They never quote the text of a data row: data may be confidential
and messages end up in logs.
"""

import errno
import os
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class TuneforkError(Exception):
    """A run failed; the message says why and what to do. Exit status 1."""

    exit_status = 1


class BadInputError(TuneforkError):
    """A recipe, a data file, a model name or a flag is wrong. Exit status 2."""

    exit_status = 2


class RecipeError(BadInputError):
    """A recipe does not describe a run; the message names each wrong field."""


class DataError(BadInputError):
    """A data file is missing, unreadable or holds rows that cannot be used."""


class ModelError(BadInputError):
    """A model cannot be found, loaded or adapted as asked."""


class AdapterError(BadInputError):
    """An adapter does not fit its base, or would change nothing."""


class IdentityError(AdapterError):
    """An adapter or run belongs to another base, tokenizer or chat template than it is put on."""


class RunFolderError(BadInputError):
    """A run folder holds something else, or lacks what was asked of it."""


class StoreError(BadInputError):
    """The store of adapters does not hold what was asked of it, or refuses what it was given."""


class DivergedError(TuneforkError):
    """A loss or a gradient is no longer finite. Exit status 1."""


class NoGradientError(DivergedError):
    """A loss left no gradient to learn from, whatever the learning rate. Exit status 1."""


class NoMemoryError(TuneforkError):
    """The device or the host has no memory left; the message names the phase. Exit status 1."""


class NoAdapterMemoryError(NoMemoryError):
    """A server has no memory left for an adapter that was asked for; later it may have."""


class NoRoomError(TuneforkError):
    """The disk will not hold what a run keeps. Exit status 1."""


class CheckpointError(TuneforkError):
    """A checkpoint cannot be written, or does not fit the run that would go on from it."""


class EngineBusyError(TuneforkError):
    """An engine's queue is full; `retry_after` seconds later it may not be."""

    retry_after = 1.0


class EngineError(TuneforkError):
    """One request failed inside an engine; others go on."""


class EngineDeadError(TuneforkError):
    """An engine as a whole no longer answers."""


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space; safetensors says so in words only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return os.strerror(errno.ENOSPC) in str(error)


def nearest(word: str, allowed: list[str]) -> str:
    """Say which of `allowed` was probably meant: `"; did you mean 'rank'?"`, or nothing."""
    matches = get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def fault_in(error: "ValidationError", before: str = "", after: str = "") -> str:
    """What is wrong with a file that tunefork writes: its first wrong field, between the words for
    a file that is damaged or another program's; or that a newer version has written it."""
    details = error.errors(include_input=False, include_url=False)
    unknown = [d for d in details if d["type"] == "extra_forbidden"]
    versions = [d for d in details if d["type"] == "literal_error" and d["loc"][-1:] in _VERSIONS]
    is_newer = versions or len(unknown) == len(details)  # all that is known here is there
    first = (versions or details)[0]
    at = ".".join(map(str, first["loc"])) or "the file"
    if not is_newer:
        return f"{before}{at}: {first['msg']}{after}"
    return (
        f"{at}: is not known to this version of tunefork; a newer one has probably written the "
        "file: use that, or upgrade (pip install --upgrade tunefork)"
    )


_VERSIONS = (("format",), ("schema_version",))
"""Fields that say which version of its form a file has."""
