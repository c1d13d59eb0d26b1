"""The runs and comparisons that were made on this machine, wherever their folders lie.

A run is remembered when its record is written and again when it is evaluated; the folder stays the
truth, and what is remembered is a copy that outlives it. Remembering never fails a run: training
takes hours, and the store may lie on a disk that is full.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.errors import TuneforkError
from tunefork.registry.database import writing
from tunefork.registry.run import RECORD, RunRecord
from tunefork.registry.store import Store

COMPARISON = "comparison.json"


@dataclass(frozen=True, slots=True)
class Remembered:
    """A run or a comparison that the store knows."""

    folder: Path
    sha256: str
    """Of its run.json or comparison.json."""
    created: str
    content: dict[str, Any]
    """Of a run: its record. Of a comparison: its `verdict`."""


def remember_run(folder: Path, record: RunRecord) -> None:
    """`record_run` into the user's store; where that cannot be, one line on stderr."""
    _try(lambda store: record_run(store, folder, record), folder)


def remember_comparison(folder: Path) -> None:
    """`record_comparison` into the user's store; where that cannot be, one line on stderr."""
    _try(lambda store: record_comparison(store, folder), folder)


def record_run(store: Store, folder: Path, record: RunRecord) -> None:
    """Put the run in `folder` in, or what it has become since; its run.json is written already."""
    place = str(folder.resolve())
    row = {
        "folder": place,
        "sha256": _sha256(folder / RECORD),
        "method": record.method,
        "status": record.status,
        "created": record.created,
        "record": record.model_dump_json(),
    }
    figures = [(place, metric, *values) for metric, values in record.metrics.items()]
    with store.guarded(), writing(store.database) as database:
        database.execute(
            "INSERT INTO runs (folder, sha256, method, status, created, record) "
            "VALUES (:folder, :sha256, :method, :status, :created, :record) "
            "ON CONFLICT DO UPDATE SET sha256 = :sha256, method = :method, status = :status, "
            "created = :created, record = :record",
            row,
        )
        database.execute("DELETE FROM evaluations WHERE run_folder = ?", (place,))
        database.executemany(
            "INSERT INTO evaluations (run_folder, metric, value, low, high) VALUES (?, ?, ?, ?, ?)",
            figures,
        )


def record_comparison(store: Store, folder: Path) -> None:
    """Put the comparison in `folder` in; its comparison.json is written already."""
    file = folder / COMPARISON
    content = json.loads(file.read_text(encoding="utf-8"))
    row = (str(folder.resolve()), _sha256(file), content["created"], json.dumps(content["verdict"]))
    with store.guarded(), writing(store.database) as database:
        database.execute("INSERT OR REPLACE INTO comparisons VALUES (?, ?, ?, ?)", row)


def known_runs(store: Store) -> list[Remembered]:
    """All runs, newest last."""
    return _known(store, "SELECT folder, sha256, created, record FROM runs")


def known_comparisons(store: Store) -> list[Remembered]:
    """All comparisons, newest last."""
    return _known(store, "SELECT folder, sha256, created, verdict FROM comparisons")


def comparison_folders() -> list[Path]:
    """Where the comparisons lie that the user's store knows and that are still there."""
    with Store.open() as store:
        known = known_comparisons(store)
    return [found.folder for found in known if (found.folder / COMPARISON).is_file()]


def _known(store: Store, select: str) -> list[Remembered]:
    with store.guarded():
        rows = store.database.execute(f"{select} ORDER BY created, folder").fetchall()
    return [Remembered(Path(row[0]), row[1], row[2], json.loads(row[3])) for row in rows]


def _try(record: Callable[[Store], None], folder: Path) -> None:
    try:
        with Store.open() as store:
            record(store)
    except (TuneforkError, OSError) as error:
        print(f"warning: {folder}: is not in the list of `tunefork runs`: {error}", file=sys.stderr)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
