"""A location of the recipe becomes examples, with every row that cannot be used named.

The format is settled once, by the first row that fits one; then all rows are held to it.
"""

from dataclasses import dataclass

from tunefork.data.convert import OPTIONAL, REQUIRED, convert, detect, rename
from tunefork.data.example import Example, Row, RowProblem
from tunefork.data.read import read_rows
from tunefork.errors import DataError, nearest
from tunefork.recipe import DataSection


@dataclass(frozen=True, slots=True)
class Ingested:
    """What the rows of one location came to."""

    location: str
    format: str
    """One of `recipe.Format`, `auto` resolved."""
    num_rows: int
    examples: list[Example]
    problems: list[RowProblem]


def ingest(location: str, section: DataSection, format: str) -> Ingested:
    """Read and convert `location`; raises DataError where it, or the section, suits no format."""
    rows = [
        rename(row, section.columns) if isinstance(row, Row) else row for row in read_rows(location)
    ]
    if format == "auto":
        format = _detect(location, rows)
    _refuse_misfits(section, format)
    examples: list[Example] = []
    problems: list[RowProblem] = []
    for row in rows:
        example = convert(row, format, section.system) if isinstance(row, Row) else row
        if isinstance(example, RowProblem):
            problems.append(example)
        elif section.labels and example.label not in section.labels:
            what = f"its label is none of the {len(section.labels)} in data.labels"
            problems.append(RowProblem(example.source, what))
        else:
            examples.append(example)
    return Ingested(location, format, len(rows), examples, problems)


def _detect(location: str, rows: list[Row | RowProblem]) -> str:
    formats = (detect(row.fields) for row in rows if isinstance(row, Row))
    found = next((format for format in formats if format), None)
    if found is None:
        expected = "; ".join(f"{name}: {' + '.join(REQUIRED[name])}" for name in REQUIRED)
        first = f"\n  {problem}" if isinstance(problem := rows[0], RowProblem) else ""
        raise DataError(
            f"{location}: no row has the fields of a known format ({expected}); "
            f"name its columns in data.columns{first}"
        )
    return found


def _refuse_misfits(section: DataSection, format: str) -> None:
    """An option that this format cannot honour is an error, not ignored."""
    fields = [*REQUIRED[format], *OPTIONAL.get(format, ())]
    for field in section.columns:
        if field not in fields:
            hint = nearest(field, fields) or f"; its fields: {', '.join(fields)}"
            raise DataError(f"data.columns.{field}: is not a field of the format {format}{hint}")
    for option, value in (("instruction", section.instruction), ("labels", section.labels)):
        if value is not None and format != "classification":
            raise DataError(
                f"data.{option}: is for classification, but the rows are {format}; remove it"
            )
    if format != "text":
        return
    for option, is_set in (
        ("system", section.system is not None),
        ("template", section.template == "chat"),
        ("supervise", section.supervise == "last"),
    ):
        if is_set:
            raise DataError(f"data.{option}: plain text has no turns; remove it")
