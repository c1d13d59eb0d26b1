"""The server's SQLite file: tenants, their keys, and what they used.

A write-ahead log with synchronous=FULL: a commit survives a power cut, and whoever reads never
waits for whoever writes. Such a file has to lie on a disk of this machine, not on a network one.
"""

import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunefork.errors import StoreError, is_disk_full
from tunefork.registry.database import writing

_SCHEMA = """
CREATE TABLE tenants (
    name TEXT PRIMARY KEY,
    models TEXT NOT NULL,
    has_base INTEGER NOT NULL,
    is_operator INTEGER NOT NULL,
    weight REAL NOT NULL,
    requests_per_minute INTEGER,
    tokens_per_minute INTEGER,
    tokens_per_month INTEGER
) STRICT;
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL REFERENCES tenants (name),
    sha256 TEXT NOT NULL,
    created TEXT NOT NULL,
    revoked TEXT
) STRICT;
CREATE TABLE usage (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    ended TEXT NOT NULL,
    tenant TEXT NOT NULL,
    key_id TEXT,
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    end_user TEXT,
    status TEXT NOT NULL,
    choices INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    first_token_s REAL,
    total_s REAL NOT NULL
) STRICT;
CREATE INDEX usage_by_time ON usage (ended);
CREATE TABLE months (
    tenant TEXT NOT NULL,
    month TEXT NOT NULL,
    tokens INTEGER NOT NULL,
    PRIMARY KEY (tenant, month)
) STRICT;
"""
_VERSION = 1
_WAIT_S = 30.0


def connect(file: Path) -> sqlite3.Connection:
    """The database in `file`, made for its owner alone if need be. Raises StoreError."""
    with as_store_error(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise StoreError(
                f"{file}: others than its owner can write to it (mode {mode:03o}), and so make "
                "keys; chmod 600 it. If that is refused or changes nothing, its file system keeps "
                "no modes (a USB disk's, a Windows share): give a file on a disk of this machine "
                "with --tenants"
            )
        database = sqlite3.connect(file, timeout=_WAIT_S, isolation_level=None)
        try:
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute("PRAGMA foreign_keys = ON")
            _prepare(database, file)
        except BaseException:
            database.close()
            raise
    return database


def _prepare(database: sqlite3.Connection, file: Path) -> None:
    if _version(database) == 0:
        with writing(database):
            if _version(database) == 0:  # and not made by another process meanwhile
                for statement in _SCHEMA.split(";"):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {_VERSION}")
    if (version := _version(database)) != _VERSION:
        raise StoreError(
            f"{file}: is of a newer tunefork (schema {version}, this one knows {_VERSION}); use "
            "that one, or another file"
        )


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


@contextmanager
def as_store_error(file: Path) -> Iterator[None]:
    """What SQLite and the file system say, as a StoreError that names `file`."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if is_disk_full(error):
            raise
        raise StoreError(f"{file}: cannot be used: {error}") from error
