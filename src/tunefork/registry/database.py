"""The store's SQLite file: opened so that what was committed stays, and written by one at a time.

A rollback journal (not a write-ahead log: the store may lie on a network file system, whose hosts
share no memory) and synchronous=EXTRA, which is FULL and also waits until the journal's removal is
on the disk: without it a power cut could take back a commit that was already acknowledged.
https://sqlite.org/pragma.html#pragma_synchronous
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunefork.errors import StoreError, is_disk_full
from tunefork.registry.migrations import migrate

FILE = "store.sqlite"
_WAIT_S = 60.0
"""How long a writer waits for another one before it gives up."""


def connect(folder: Path) -> sqlite3.Connection:
    """The database in `folder`, made or brought to the present schema. Raises StoreError."""
    file = folder / FILE
    with as_store_error(file):
        database = sqlite3.connect(file, timeout=_WAIT_S, isolation_level=None)
        try:
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA journal_mode = DELETE")
            database.execute("PRAGMA synchronous = EXTRA")
            database.execute("PRAGMA foreign_keys = ON")
            migrate(database, str(file))
        except BaseException:
            database.close()
            raise
    return database


@contextmanager
def writing(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """One transaction: all of it is on the disk afterwards or, after an exception, none."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield database
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


@contextmanager
def as_store_error(file: Path) -> Iterator[None]:
    """What SQLite and the file system say, as a StoreError that names `file`."""
    try:
        yield
    except sqlite3.Error as error:
        hint = ""
        if "malformed" in str(error) or "not a database" in str(error):
            hint = "; it is damaged: put back a copy, or move it away to begin anew"
        raise StoreError(f"{file}: the store cannot be used: {error}{hint}") from error
    except OSError as error:
        if is_disk_full(error):
            raise
        raise StoreError(f"{file}: the store cannot be used: {error}") from error
