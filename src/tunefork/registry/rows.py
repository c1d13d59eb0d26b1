"""The store's statements: what stands in which row. Callers hold the transaction."""

import json
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime

from tunefork.errors import StoreError, nearest
from tunefork.registry.lineage import Fingerprints, Lineage
from tunefork.registry.names import Reference, digest_prefix, parse_reference
from tunefork.registry.objects import StoredFile

SELECT = """SELECT v.*, b.model_id, b.revision,
    (SELECT group_concat(tag, ' ') FROM tags t WHERE t.version_id = v.id) AS tags
    FROM versions v LEFT JOIN bases b ON b.id = v.base_id"""


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def find(database: sqlite3.Connection, text: str) -> sqlite3.Row:
    """The row of the version that a reference means, by one statement: a moving tag is never torn.

    Raises StoreError, which says what there is.
    """
    prefix = digest_prefix(text)
    if prefix is not None and not _is_name(database, text):
        return _of_digest(database, text, prefix)
    reference = parse_reference(text)
    row: sqlite3.Row | None
    if reference.tag is not None:
        row = database.execute(
            f"{SELECT} JOIN tags g ON g.version_id = v.id WHERE g.name = ? AND g.tag = ?",
            (reference.name, reference.tag),
        ).fetchone()
    elif reference.number is not None:
        row = database.execute(
            f"{SELECT} WHERE v.name = ? AND v.number = ?", (reference.name, reference.number)
        ).fetchone()
    else:
        row = database.execute(
            f"{SELECT} WHERE v.name = ? ORDER BY v.number DESC LIMIT 1", (reference.name,)
        ).fetchone()
    if row is None:
        raise StoreError(_what_there_is(database, text, reference))
    return row


def files_of(database: sqlite3.Connection, version_id: int) -> list[StoredFile]:
    """A version's files in the order of their names."""
    rows = database.execute(
        "SELECT path, sha256, bytes FROM files WHERE version_id = ? ORDER BY path", (version_id,)
    )
    return [StoredFile(*row) for row in rows]


def insert_version(
    database: sqlite3.Connection,
    name: str,
    digest: str,
    files: Sequence[StoredFile],
    lineage: Lineage,
    note: str,
) -> int:
    """The next version of `name`; returns its id."""
    (number,) = database.execute(
        "INSERT INTO names VALUES (?, 1) ON CONFLICT DO UPDATE SET last_number = last_number + 1 "
        "RETURNING last_number",
        (name,),
    ).fetchone()
    told = lineage.model_dump(mode="json", exclude={"metrics", "identity"}, exclude_none=True)
    row = database.execute(
        "INSERT INTO versions (name, number, digest, bytes, base_id, method, lineage, note, "
        "created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
        (
            *(name, number, digest, sum(file.bytes for file in files)),
            *(_base(database, lineage), lineage.method, json.dumps(told), note, now()),
        ),
    ).fetchone()
    version_id = int(row[0])
    database.executemany(
        "INSERT INTO files VALUES (?, ?, ?, ?)",
        [(version_id, file.path, file.sha256, file.bytes) for file in files],
    )
    database.executemany(
        "INSERT INTO evaluations (version_id, metric, value, low, high) VALUES (?, ?, ?, ?, ?)",
        [(version_id, name, *figures) for name, figures in (lineage.metrics or {}).items()],
    )
    return version_id


def move_tag(database: sqlite3.Connection, name: str, tag: str, version_id: int | None) -> bool:
    """Put a tag on a version of `name`, or take it off; False where there was none to take off."""
    number = None
    if version_id is None:
        deleted = database.execute("DELETE FROM tags WHERE name = ? AND tag = ?", (name, tag))
        if not deleted.rowcount:
            return False
    else:
        database.execute(
            "INSERT INTO tags VALUES (?, ?, ?) "
            "ON CONFLICT DO UPDATE SET version_id = excluded.version_id",
            (name, tag, version_id),
        )
        (number,) = database.execute(
            "SELECT number FROM versions WHERE id = ?", (version_id,)
        ).fetchone()
    database.execute(
        "INSERT INTO tag_moves (name, tag, number, moved) VALUES (?, ?, ?, ?)",
        (name, tag, number, now()),
    )
    return True


def _base(database: sqlite3.Connection, lineage: Lineage) -> int | None:
    """The id of the base's row, which is made if need be; None where the base is not known."""
    identity = lineage.identity or Fingerprints()
    if lineage.base is None and identity.weights_sha256 is None:
        return None
    key = [lineage.base or "", lineage.revision or ""]
    key += [value or "" for value in identity.model_dump().values()]
    columns = "model_id, revision, weights_sha256, tokenizer_sha256, template_sha256"
    database.execute(f"INSERT OR IGNORE INTO bases ({columns}) VALUES (?, ?, ?, ?, ?)", key)
    row = database.execute(
        f"SELECT id FROM bases WHERE ({columns}) = (?, ?, ?, ?, ?)", key
    ).fetchone()
    return int(row[0])


def _is_name(database: sqlite3.Connection, name: str) -> bool:
    return database.execute("SELECT 1 FROM names WHERE name = ?", (name,)).fetchone() is not None


def _of_digest(database: sqlite3.Connection, text: str, prefix: str) -> sqlite3.Row:
    rows: list[sqlite3.Row] = database.execute(
        f"{SELECT} WHERE v.digest >= ? AND v.digest < ? || 'g' ORDER BY v.id", (prefix, prefix)
    ).fetchall()
    if not rows:
        raise StoreError(f"{text}: no version has this digest")
    if len({row["digest"] for row in rows}) > 1:
        raise StoreError(f"{text}: versions of different content begin so; give more digits")
    return rows[-1]


def _what_there_is(database: sqlite3.Connection, text: str, reference: Reference) -> str:
    name = reference.name
    numbers = [
        r[0] for r in database.execute("SELECT number FROM versions WHERE name = ?", (name,))
    ]
    if not numbers:
        names = [row[0] for row in database.execute("SELECT DISTINCT name FROM versions")]
        hint = nearest(name, names) or "; `tunefork adapters list` shows all"
        return f"{text}: nothing is published under {name}{hint}"
    tags = [r[0] for r in database.execute("SELECT tag FROM tags WHERE name = ?", (name,))]
    known = [f"v{number}" for number in sorted(numbers)[-5:]] + sorted(tags)
    return f"{text}: no such version; {name} has {', '.join(known)}"
