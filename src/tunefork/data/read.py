"""Rows of a JSONL, CSV or Parquet file, or of a hub data set, each with its file:line.

A line that cannot be read becomes a `RowProblem` and reading goes on, so that one pass reports all
of them. Only what makes the whole file useless (missing, unreadable, empty, no such data set) is a
DataError. pyarrow and datasets are imported when such a location is opened, because they are an
optional extra and slow to import.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunefork.data.example import Row, RowProblem
from tunefork.errors import DataError

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.-]+))?")
_EXTRA = "is not installed; pip install 'tunefork[data]'"
_LONGEST_NAME = 64
"""Of a field, that is said: what is longer may be data."""


def read_rows(location: str) -> Iterator[Row | RowProblem]:
    """Yield the rows of a .jsonl, .csv or .parquet file or of a hub id, `owner/name[:split]`.

    Blank lines are passed over. Raises DataError, at the latest with the last row, where the
    location is none of these, cannot be read or holds no row.
    """
    is_empty = True
    for row in _open(location):
        is_empty = False
        yield row
    if is_empty:
        raise DataError(f"{location}: holds no rows; give a file with at least one")


def _open(location: str) -> Iterator[Row | RowProblem]:
    path = Path(location)
    match path.suffix.lower():
        case ".jsonl":
            return _read_jsonl(path)
        case ".csv":
            return _read_csv(path)
        case ".parquet":
            return _read_parquet(path)
    hub_id = _HUB_ID.fullmatch(location)
    if path.exists() or hub_id is None:
        found = "is not such a file" if path.exists() else "does not exist"
        raise DataError(
            f"{location}: {found}; give a .jsonl, .csv or .parquet file, or a hub data set as "
            "owner/name or owner/name:split"
        )
    return _read_hub(hub_id["name"], hub_id["split"] or "train")


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such file; check the path (data.train, data.eval)")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "is damaged"
    return DataError(f"{path}: cannot be read ({reason})")


def _read_jsonl(path: Path) -> Iterator[Row | RowProblem]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield _parse_json(f"{path.name}:{number}", line)
    except OSError as error:
        raise _unreadable(path, error) from error


class _DoubledError(Exception):
    """An object gives one name two values, of which json.loads would take the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DoubledError(next(name for name in names if names.count(name) > 1))
    return fields


def _parse_json(source: str, line: bytes) -> Row | RowProblem:
    try:
        fields = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except _DoubledError as error:
        [name] = error.args
        shown = repr(name) if len(name) <= _LONGEST_NAME and name.isprintable() else "a name"
        return RowProblem(source, f"has {shown} twice; keep one of the two")
    except UnicodeDecodeError as error:
        return RowProblem(source, f"is not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return RowProblem(source, f"is not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError):
        return RowProblem(source, "is not JSON that can be held (a number or nesting without end)")
    if not isinstance(fields, dict):
        return RowProblem(source, "is not a JSON object; one {...} a line")
    return Row(source, fields)


def _read_csv(path: Path) -> Iterator[Row | RowProblem]:
    try:
        # surrogateescape keeps broken bytes in their cell, so that the row can be named.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = _csv_header(path, reader)
            while True:
                source = f"{path.name}:{reader.line_num + 1}"
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield RowProblem(source, f"is not CSV ({error})")
                    continue
                if cells:
                    yield _csv_row(source, header, cells)
    except OSError as error:
        raise _unreadable(path, error) from error


def _csv_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path}:1: the header is not CSV ({error})") from error
    if _is_broken("".join(header)):
        raise DataError(f"{path}:1: the header is not UTF-8; save the file as UTF-8")
    if len(set(header)) < len(header):
        raise DataError(f"{path}:1: the header names a column twice; rename one")
    return header


def _csv_row(source: str, header: list[str], cells: list[str]) -> Row | RowProblem:
    if len(cells) != len(header):
        return RowProblem(source, f"has {len(cells)} cells, but the header has {len(header)}")
    if any(_is_broken(cell) for cell in cells):
        return RowProblem(source, "is not UTF-8")
    return Row(source, dict(zip(header, cells, strict=True)))


def _is_broken(text: str) -> bool:
    """Whether surrogateescape had to keep a byte that is not UTF-8."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow, which {_EXTRA}") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            class_names = _class_names(file.schema_arrow.metadata or {})
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path.name}:{number}", _with_names(fields, class_names))
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Of the columns that the package datasets, which writes so, calls class labels."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: list(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}  # somebody else's, or none


def _read_hub(name: str, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name}: a hub data set needs the package datasets, which {_EXTRA}; or, if this is "
            "a file, give its .jsonl, .csv or .parquet name"
        ) from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}:{split}: cannot be loaded from the hub ({type(error).__name__}: {error}); "
            "check its name, its split, the network and your access"
        ) from error
    class_names = {
        column: feature.names
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for number, fields in enumerate(rows, start=1):
        yield Row(f"{name}:{split}:{number}", _with_names(fields, class_names))


def _with_names(fields: dict[str, Any], class_names: dict[str, list[str]]) -> dict[str, Any]:
    """Put a class label's name in place of its number; the numbers mean nothing to a model."""
    named = {
        column: names[fields[column]] if 0 <= fields[column] < len(names) else None
        for column, names in class_names.items()
        if isinstance(fields[column], int)
    }
    return fields | named
