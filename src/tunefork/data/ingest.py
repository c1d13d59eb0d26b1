"""A location of the recipe becomes examples, with every row that cannot be used named.

The format is settled once, by the fields of all rows; then each row is held to it. Rows that speak
for different formats are an error: whichever was taken, the others would mean something else.
"""

from dataclasses import dataclass

from tunefork.data.convert import OPTIONAL, REQUIRED, convert, detect, rename
from tunefork.data.example import Example, Row, RowProblem
from tunefork.data.faults import ONLY_CLASSIFICATION
from tunefork.data.read import read_rows
from tunefork.errors import DataError, nearest
from tunefork.recipe import DataSection, FaultSection


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
    is_detected = format == "auto"
    if is_detected:
        format = _detect(location, rows)
    _refuse_misfits(section, format)
    examples: list[Example] = []
    problems: list[RowProblem] = []
    for row in rows:
        example = convert(row, format, section.system) if isinstance(row, Row) else row
        if isinstance(example, RowProblem):
            if is_detected and isinstance(row, Row) and _fits_another(row, format):
                what = f"{example.what} (the rows are {format}; if not, set data.format)"
                example = RowProblem(example.source, what, example.kind)
            problems.append(example)
        elif section.labels and example.label not in section.labels:
            what = f"its label is none of the {len(section.labels)} in data.labels"
            problems.append(RowProblem(example.source, what))
        else:
            examples.append(example)
    return Ingested(location, format, len(rows), examples, problems)


def _detect(location: str, rows: list[Row | RowProblem]) -> str:
    """The one format that rows have the fields of; rows with those of none are problems, later.

    A field that is null counts: it is missing from its row, and the row is no other format by that.
    A field that is null in every row does not: a table has its columns whether used or not. Rows
    that lack a field of a format that others have (`text` without `label`) are of that, and bad.
    """
    usable = [row for row in rows if isinstance(row, Row)]
    used = {name for row in usable for name, value in row.fields.items() if value is not None}
    first: dict[str, Row] = {}
    for row in usable:
        format = detect(row.fields.keys() & used)
        if format is not None:
            first.setdefault(format, row)
    for format in first:
        if all(set(REQUIRED[format]) >= set(REQUIRED[other]) for other in first):
            return format
    if first:
        found = "; ".join(f"{row.source} is {format}" for format, row in first.items())
        raise DataError(
            f"{location}: its rows have the fields of different formats ({found}); set data.format "
            f"to one of {', '.join(first)}: rows that lack its fields are then bad rows "
            "(data.bad_rows)"
        )
    expected = "; ".join(f"{name}: {' + '.join(REQUIRED[name])}" for name in REQUIRED)
    problem = f"\n  {rows[0]}" if isinstance(rows[0], RowProblem) else ""
    raise DataError(
        f"{location}: no row has the fields of a known format ({expected}); "
        f"name its columns in data.columns{problem}"
    )


def _fits_another(row: Row, format: str) -> bool:
    """Whether this row, by the fields that it has values for, would be of another format."""
    fields = [name for name, value in row.fields.items() if value is not None]
    return detect(fields) not in (None, format)


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
    for name, default in FaultSection.model_fields.items():
        is_set = getattr(section.faults, name) != default.default
        if is_set and name in ONLY_CLASSIFICATION and format != "classification":
            raise DataError(
                f"data.faults.{name}: is for classification, but the rows are {format}; remove it"
            )
    if format != "text":
        return
    for option, is_set in (
        ("faults.roles", section.faults.roles != FaultSection().roles),
        ("system", section.system is not None),
        ("template", section.template == "chat"),
        ("supervise", section.supervise == "last"),
    ):
        if is_set:
            raise DataError(f"data.{option}: plain text has no turns; remove it")
