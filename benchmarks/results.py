"""One shape for every benchmark's results: benchmarks/results/NAME.json, written by its script."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
_PACKAGES = ("tunefork", "torch", "transformers", "peft", "bitsandbytes")


def write(
    name: str,
    rows: list[dict[str, Any]],
    *,
    device: str,
    command: str | None = None,
    versions: dict[str, str] | None = None,
) -> Path:
    """Write the rows of benchmark `name` with what is needed to reproduce them.

    `command` and `versions` are those of another machine, where that made the measurements.
    """
    file = FOLDER / f"{name}.json"
    result = {
        "command": command or " ".join(["python", *map(_relative, sys.argv)]),
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions or {"python": platform.python_version()} | _versions(),
        "rows": rows,
    }
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return file


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    here = Path(__file__).parent
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    )
    if head.returncode:
        return "unknown"
    dirty = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "src"], cwd=here)
    return head.stdout.strip() + ("+changes" if dirty.returncode else "")


def _relative(argument: str) -> str:
    path = Path(argument)
    return str(path.name if path.is_absolute() else path)
