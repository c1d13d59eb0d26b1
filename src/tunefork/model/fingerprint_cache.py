"""Fingerprints that were computed before, found again by the files that they were computed from.

One small JSON file for each set of paths, in `fingerprints/` of TUNEFORK_HOME. It counts only where
every file has still the path, size, mtime, ctime and inode that it had: a change that sets the
modification time back shows in the change time. It is replaced by one rename, so that concurrent
processes read the old entry or the new one. A cache that cannot be read or written is none.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tunefork.home import home
from tunefork.model.damage import unreadable

_FORMAT = 1
"""Raised whenever a fingerprint is defined otherwise: older entries then count for nothing."""

Key = list[list[Any]]


def key_of(files: Iterable[Path], what: str) -> Key:
    """Path, size, times and inode of each file, by path; raises ModelError where one is gone."""
    with unreadable(f"{what} cannot be read"):
        rows = []
        for file in sorted({file.resolve() for file in files}):
            stat = file.stat()
            times = (stat.st_mtime_ns, stat.st_ctime_ns)
            rows.append([str(file), stat.st_size, *times, stat.st_ino])
    return rows


def recall(kind: str, key: Key, versions: Sequence[str] = ()) -> str | None:
    """What was stored as `kind` for exactly this key by these `versions`, or None."""
    try:
        entry = json.loads(_file(kind, key).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(entry, dict) or entry.get("key") != [_FORMAT, list(versions), key]:
        return None
    value = entry.get("value")
    return value if isinstance(value, str) else None


def remember(kind: str, key: Key, value: str, versions: Sequence[str] = ()) -> None:
    """Store `value`, in place of what was stored for other states of the same files."""
    entry = json.dumps({"key": [_FORMAT, list(versions), key], "value": value})
    file = _file(kind, key)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
        scratch = Path(name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(entry)
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)


def _file(kind: str, key: Key) -> Path:
    paths = "\n".join(row[0] for row in key)
    return (
        home() / "fingerprints" / f"{kind}-{hashlib.sha256(paths.encode()).hexdigest()[:32]}.json"
    )
