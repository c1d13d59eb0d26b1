"""The store's schema, as the steps that led to it, and the runner that takes them.

A step is a list of statements; SQLite's `user_version` says how many were taken. Steps go forward
only: one that has been in a release is never changed, a new one is appended. Each is taken in one
transaction with its number, so that a process killed amidst it leaves the earlier version whole.
"""

import sqlite3

from tunefork.errors import StoreError

_CORE = (
    """CREATE TABLE bases (
        id INTEGER PRIMARY KEY,
        model_id TEXT NOT NULL,
        revision TEXT NOT NULL,
        weights_sha256 TEXT NOT NULL,
        tokenizer_sha256 TEXT NOT NULL,
        template_sha256 TEXT NOT NULL,
        UNIQUE (model_id, revision, weights_sha256, tokenizer_sha256, template_sha256)
    )""",
    """CREATE TABLE runs (
        folder TEXT PRIMARY KEY,
        sha256 TEXT NOT NULL,
        method TEXT,
        status TEXT NOT NULL,
        created TEXT NOT NULL,
        record TEXT NOT NULL,
        metrics TEXT NOT NULL
    )""",
    "CREATE INDEX runs_created ON runs (created)",
    # Numbers are never given twice, even after the newest version was removed.
    "CREATE TABLE names (name TEXT PRIMARY KEY, last_number INTEGER NOT NULL) WITHOUT ROWID",
    """CREATE TABLE versions (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL REFERENCES names,
        number INTEGER NOT NULL,
        digest TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        base_id INTEGER REFERENCES bases,
        method TEXT,
        lineage TEXT NOT NULL,
        note TEXT NOT NULL,
        created TEXT NOT NULL,
        UNIQUE (name, number)
    )""",
    "CREATE INDEX versions_digest ON versions (digest)",
    """CREATE TABLE files (
        version_id INTEGER NOT NULL REFERENCES versions ON DELETE CASCADE,
        path TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        PRIMARY KEY (version_id, path)
    ) WITHOUT ROWID""",
    """CREATE TABLE tags (
        name TEXT NOT NULL,
        tag TEXT NOT NULL,
        version_id INTEGER NOT NULL REFERENCES versions,
        PRIMARY KEY (name, tag)
    ) WITHOUT ROWID""",
    "CREATE INDEX tags_version ON tags (version_id)",
)

_HOLDS_AND_FIGURES = (
    """CREATE TABLE holds (
        id TEXT PRIMARY KEY,
        version_id INTEGER NOT NULL REFERENCES versions,
        owner TEXT NOT NULL,
        pid INTEGER NOT NULL,
        created TEXT NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX holds_version ON holds (version_id)",
    """CREATE TABLE tag_moves (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        tag TEXT NOT NULL,
        number INTEGER,
        moved TEXT NOT NULL
    )""",
    "CREATE INDEX tag_moves_tag ON tag_moves (name, tag)",
    """CREATE TABLE evaluations (
        id INTEGER PRIMARY KEY,
        run_folder TEXT REFERENCES runs ON DELETE CASCADE,
        version_id INTEGER REFERENCES versions ON DELETE CASCADE,
        metric TEXT NOT NULL,
        value REAL NOT NULL,
        low REAL NOT NULL,
        high REAL NOT NULL,
        CHECK ((run_folder IS NULL) <> (version_id IS NULL))
    )""",
    "CREATE UNIQUE INDEX evaluations_run ON evaluations (run_folder, metric)",
    "CREATE UNIQUE INDEX evaluations_version ON evaluations (version_id, metric)",
    """INSERT INTO evaluations (run_folder, metric, value, low, high)
        SELECT folder, key, json_extract(value, '$[0]'), json_extract(value, '$[1]'),
            json_extract(value, '$[2]')
        FROM runs, json_each(runs.metrics)""",
    "ALTER TABLE runs DROP COLUMN metrics",
    """CREATE TABLE comparisons (
        folder TEXT PRIMARY KEY,
        sha256 TEXT NOT NULL,
        created TEXT NOT NULL,
        verdict TEXT NOT NULL
    )""",
)

STEPS = (_CORE, _HOLDS_AND_FIGURES)
VERSION = len(STEPS)


def migrate(database: sqlite3.Connection, where: str) -> None:
    """Take the steps that `database` lacks; `where` names it in errors.

    Raises StoreError for a database that a newer tunefork has made.
    """
    if _version(database) == VERSION:
        return
    for number, step in enumerate(STEPS, 1):
        database.execute("BEGIN IMMEDIATE")  # another process may be at the same step
        try:
            if _version(database) > VERSION:
                raise StoreError(
                    f"{where}: was made by a newer tunefork (schema {_version(database)}; this one "
                    f"knows {VERSION}); upgrade tunefork, or give another folder by TUNEFORK_HOME"
                )
            if _version(database) < number:
                for statement in step:
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {number}")
            database.execute("COMMIT")
        except BaseException:
            database.execute("ROLLBACK")
            raise


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])
