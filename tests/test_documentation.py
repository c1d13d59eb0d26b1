from pathlib import Path

import pytest

from tunefork.documentation import PAGES, recipe_markdown, write_pages

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_those_of_the_schemas(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == PAGES[name](), "run: python -m tunefork.documentation docs"


def test_every_key_of_the_recipe_has_a_meaning() -> None:
    rows = [line for line in recipe_markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert not [row for row in rows if row.endswith("|  |")]


def test_pages_are_written(tmp_path: Path) -> None:
    write_pages(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(PAGES)
