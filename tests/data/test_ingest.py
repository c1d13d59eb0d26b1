"""One format for all rows: found by their fields, whichever row comes first."""

from collections.abc import Callable
from typing import Any

import pytest

from tunefork.data.ingest import ingest
from tunefork.errors import DataError
from tunefork.recipe import DataSection

Write = Callable[..., str]

LABELLED = [{"text": f"words {n}", "label": "a"} for n in range(3)]
TEXTS = [{"text": f"words {n}"} for n in range(3)]
ASKED = [{"prompt": "x", "completion": "y"}]


def _format(location: str) -> str:
    return ingest(location, DataSection(train=location), "auto").format


@pytest.mark.parametrize("first", [{"text": "words", "label": None}, {"text": "words"}])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_row_without_its_label_is_a_bad_row_wherever_it_stands(
    write_rows: Write, first: dict[str, Any], is_first: bool
) -> None:
    location = write_rows([first, *LABELLED] if is_first else [*LABELLED, first])
    found = ingest(location, DataSection(train=location), "auto")
    assert (found.format, len(found.examples)) == ("classification", 3)
    line = 1 if is_first else 4
    [problem] = map(str, found.problems)
    assert problem == (
        f"train.jsonl:{line}: the field 'label' is missing (the rows are classification; if not, "
        "set data.format)"
    )


def test_a_set_format_is_not_questioned(write_rows: Write) -> None:
    location = write_rows([TEXTS[0], *LABELLED])
    found = ingest(location, DataSection(train=location, format="text"), "text")
    assert (len(found.examples), found.problems) == (4, [])
    found = ingest(location, DataSection(train=location), "classification")
    assert [problem.what for problem in found.problems] == ["the field 'label' is missing"]


@pytest.mark.parametrize("rows", [[*LABELLED, *ASKED], [*ASKED, *LABELLED], [*TEXTS, *ASKED]])
def test_rows_of_different_formats_are_refused_by_line(
    write_rows: Write, rows: list[dict[str, Any]]
) -> None:
    location = write_rows(rows)
    with pytest.raises(DataError) as caught:
        _format(location)
    at = rows.index(ASKED[0]) + 1
    assert f"train.jsonl:{at} is prompt_completion" in str(caught.value)
    assert "train.jsonl:1 is " in str(caught.value) and "set data.format to one of" in str(
        caught.value
    )


def test_a_column_that_no_row_uses_is_not_there(write_rows: Write) -> None:
    """As Parquet has it, where one schema serves several files."""
    unused = {"label": None, "messages": None}
    assert _format(write_rows([row | unused for row in TEXTS])) == "text"
    assert _format(write_rows([{"messages": None} | row for row in LABELLED])) == "classification"


def test_rows_of_no_format_do_not_decide(write_rows: Write) -> None:
    location = write_rows([{"other": 1}, "not JSON", *LABELLED])
    assert _format(location) == "classification"
    with pytest.raises(DataError, match="no row has the fields of a known format"):
        _format(write_rows(["not JSON", {"other": 1}]))
