"""Who is at work in the store, by locks that die with their process (flock).

Whoever writes files takes the store's lock together with other writers; garbage collection takes it
alone. So what a publish has written, and no version names yet, is never collected, however long it
takes; and what a killed one has left is collected at once. A hold is a file of its own, locked by
the process that serves a version.
"""

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunefork.errors import StoreError

_EVERY_S = 0.02


@contextmanager
def together(root: Path) -> Iterator[None]:
    """Write files beside other writers; waits while garbage is collected."""
    with (root / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextmanager
def alone(root: Path, *, wait_s: float) -> Iterator[None]:
    """Be the only one; raises StoreError where writers do not end within `wait_s`."""
    until = time.monotonic() + wait_s
    with (root / "lock").open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise StoreError(
                        f"{root}: versions are being published; collect garbage when that is done"
                    ) from error
                time.sleep(_EVERY_S)
        yield


def hold_file(root: Path, hold: str) -> Path:
    """The file whose lock says that `hold` is alive."""
    return root / "holds" / hold


def take_hold(root: Path) -> tuple[str, int]:
    """A new hold's id and the descriptor that keeps it; closing that, or dying, lets it go."""
    hold = secrets.token_hex(12)
    file = hold_file(root, hold)
    file.parent.mkdir(exist_ok=True)
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return hold, descriptor


def is_held(root: Path, hold: str) -> bool:
    """Whether the process that took `hold`, or a child that it forked, still lives."""
    try:
        descriptor = os.open(hold_file(root, hold), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
