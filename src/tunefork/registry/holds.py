"""Holds: a server's claim on the versions that it serves, which ends with its process.

The row says who; the lock on the hold's file (`registry/locks.py`) says whether that process lives.
No time-out is involved: a server that is stopped for a day by a debugger still holds, and one that
was killed does not.
"""

import os
import sqlite3
from pathlib import Path
from typing import Self

from tunefork.registry.locks import hold_file, is_held
from tunefork.registry.version import Version


class Hold:
    """A hold on a version; `release` it, or use it in a `with`."""

    def __init__(self, version: Version, hold: str, descriptor: int) -> None:
        self.version = version
        self._hold = hold
        self._descriptor = descriptor

    def release(self) -> None:
        """Let the version go. Its row stays until someone asks, and counts for nothing."""
        if self._descriptor >= 0:
            hold_file(self.version.root, self._hold).unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def owners(database: sqlite3.Connection, root: Path, version_id: int) -> list[str]:
    """Who holds a version now."""
    rows = database.execute("SELECT * FROM holds WHERE version_id = ?", (version_id,))
    return [f"{row['owner']} (process {row['pid']})" for row in rows if is_held(root, row["id"])]


def dead_holds(database: sqlite3.Connection, root: Path) -> list[str]:
    """Holds whose process is gone."""
    holds = [str(row[0]) for row in database.execute("SELECT id FROM holds")]
    return [hold for hold in holds if not is_held(root, hold)]
