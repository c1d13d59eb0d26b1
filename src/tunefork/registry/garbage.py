"""What no version names any more is taken away, and what a killed process left behind.

It runs alone (`registry/locks.py`): a publish in progress is waited for, so that what it has
written is never taken for garbage. What a version names stays, and a version that a tag or a live
process holds cannot be removed; so no file of those is ever touched.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tunefork.registry.database import writing
from tunefork.registry.holds import dead_holds
from tunefork.registry.locks import alone, hold_file
from tunefork.registry.store import Store
from tunefork.registry.version import views

_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Collected:
    """What was taken away, or would be."""

    files: int
    """Contents that no version names, and unfinished ones."""
    bytes: int
    folders: int
    """Folders of versions that are gone."""
    holds: int
    """Holds of processes that are gone."""


def collect_garbage(store: Store, *, dry_run: bool = False, wait_s: float = _WAIT_S) -> Collected:
    """Take the garbage away, unless `dry_run`. Raises StoreError where publishes do not end."""
    with store.guarded(), alone(store.root, wait_s=wait_s):
        database = store.database
        named = {row[0] for row in database.execute("SELECT DISTINCT sha256 FROM files")}
        digests = {row[0] for row in database.execute("SELECT DISTINCT digest FROM versions")}
        objects = [f for f in store.objects.folder.glob("??/*") if f.name not in named]
        folders = [f for f in views(store.root).glob("*") if f.name not in digests]
        scratch = list(store.objects.scratch.iterdir())
        unfinished = [f for s in scratch for f in ([s] if s.is_file() else s.rglob("*"))]
        lost = [file for file in [*objects, *unfinished] if file.is_file()]
        dead = dead_holds(database, store.root)
        found = Collected(
            files=len(lost),
            bytes=sum(file.stat().st_size for file in lost),
            folders=len(folders),
            holds=len(dead),
        )
        if not dry_run:
            _take(store, [*objects, *folders, *scratch], dead)
        return found


def _take(store: Store, paths: list[Path], dead: list[str]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    with writing(store.database) as database:
        database.executemany("DELETE FROM holds WHERE id = ?", [(hold,) for hold in dead])
    for hold in dead:
        hold_file(store.root, hold).unlink(missing_ok=True)
