from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from tunefork.schema_markdown import schema_markdown


class Inner(BaseModel):
    """An inner section.

    A second paragraph that does not belong in the page.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    share: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """A share | of the whole."""


class Outer(BaseModel):
    """The outer section."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    """What it is called."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    inner: Inner
    many: dict[str, Inner] = {}
    """More of them."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds."""
    path: tuple[float, ...] = (0.5,)
    """Numbers."""


PAGE = schema_markdown(Outer, "Title", "Introduction.\n")


def test_every_field_stands_with_type_default_and_meaning() -> None:
    assert PAGE.startswith("# Title\n\nIntroduction.\n\n## Top level\n\nThe outer section.\n\n")
    assert "| `name` | text | required | What it is called. |" in PAGE
    assert '| `kind` | `a`, `b` | `"a"` | Which. |' in PAGE
    assert "| `seed` | integer (at least 0, below 4294967296) | `0` | Seeds. |" in PAGE
    assert "| `path` | list of number | `[0.5]` | Numbers. |" in PAGE


def test_a_section_is_explained_by_its_class_and_written_once_under_all_its_paths() -> None:
    assert "| `inner` | section | required | An inner section. |" in PAGE
    assert "## `inner`, `many.*`\n\nAn inner section.\n\n" in PAGE
    assert "second paragraph" not in PAGE
    assert PAGE.count("`share`") == 1


def test_bounds_inside_a_union_are_kept_and_bars_are_escaped() -> None:
    row = r"| `share` | number (at least 0, below 1) or null | `null` | A share \| of the whole. |"
    assert row in PAGE
