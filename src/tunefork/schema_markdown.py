"""A pydantic schema as a page of Markdown tables, one table a section.

docs/recipe.md and docs/comparison.md are written by this, so that the docstring under a field is
its only documentation. Works on any model whose fields are documented that way
(`use_attribute_docstrings`); a test compares the pages with the schema.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


def schema_markdown(schema: type[BaseModel], title: str, introduction: str) -> str:
    """A Markdown page: `title`, `introduction`, then a table for `schema` and each section in it.

    Sections are headed by the path that leads to them (`compare`, `methods.*.search[]`), in the
    order of the fields; a section that two fields share is written once, under both paths.
    """
    paths: dict[type[BaseModel], list[str]] = {}
    _collect(schema, "", paths)
    parts = [f"# {title}", introduction.strip()]
    for section, at in paths.items():
        heading = ", ".join(f"`{path}`" for path in at if path) or "Top level"
        parts += [f"## {heading}", _first_paragraph(section), _table(section)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _collect(section: type[BaseModel], path: str, into: dict[type[BaseModel], list[str]]) -> None:
    """Add `section` at `path` and every section below it to `into`, outermost first."""
    into.setdefault(section, []).append(path)
    for name, field in section.model_fields.items():
        for inner, suffix in _sections_in(field.annotation):
            _collect(inner, f"{path}.{name}{suffix}".lstrip("."), into)


def _sections_in(annotation: Any) -> list[tuple[type[BaseModel], str]]:
    """The schemas inside a field's type, each with what its path gains: `[]`, `.*` or nothing."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, "")]
    suffix = {list: "[]", tuple: "[]", dict: ".*"}.get(get_origin(annotation), "")
    return [
        (section, suffix + inner)
        for argument in get_args(annotation)
        for section, inner in _sections_in(argument)
    ]


def _table(section: type[BaseModel]) -> str:
    """The fields of one section: name, type with its bounds, default, documentation."""
    lines: list[tuple[str, ...]] = [
        ("key", "type", "default", "meaning"),
        ("---",) * 4,
        *(
            (f"`{name}`", _type_text(field), _default_text(field), _meaning(field))
            for name, field in section.model_fields.items()
        ),
    ]
    if all(field.is_required() for field in section.model_fields.values()):
        lines = [(key, kind, meaning) for key, kind, _, meaning in lines]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Escape what would end a table cell early."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def _meaning(field: FieldInfo) -> str:
    """The field's documentation; a section without its own is explained by its class."""
    if field.description is None:
        sections = _sections_in(field.annotation)
        return _first_paragraph(sections[0][0]) if sections else ""
    return " ".join(field.description.split())


def _first_paragraph(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _type_text(field: FieldInfo) -> str:
    """The type in words: `integer (at least 1)`, `list of text`, `number or null`."""
    return _annotation_text(field.annotation) + _bounds_text(field.metadata)


def _bounds_text(constraints: Iterable[Any]) -> str:
    """` (at least 0, below 1)` for Ge(0), Lt(1); a nested type keeps them in a FieldInfo."""
    flat = [c for outer in constraints for c in getattr(outer, "metadata", [outer])]
    bounds = [
        f"{words} {_number(getattr(constraint, kind))}"
        for constraint in flat
        for kind, words in _BOUNDS.items()
        if hasattr(constraint, kind)
    ]
    return f" ({', '.join(bounds)})" if bounds else ""


_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_SCALARS = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
    Path: "path",
}


def _annotation_text(annotation: Any) -> str:
    """A type annotation as a reader of JSON or YAML would say it."""
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if hasattr(annotation, "__metadata__"):  # Annotated[X, ...]
        return _annotation_text(annotation.__origin__) + _bounds_text(annotation.__metadata__)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_annotation_text(argument) for argument in arguments)
    if origin is dict:
        return f"mapping of {_annotation_text(arguments[0])} to {_annotation_text(arguments[1])}"
    if origin in (list, tuple):
        return f"list of {_annotation_text(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    values = arguments or tuple(annotation)  # a Literal's, or an Enum's members
    return ", ".join(f"`{value}`" for value in values)


def _default_text(field: FieldInfo) -> str:
    """The default as JSON; `required` where there is none; nothing for a section's own defaults."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=False)
    if isinstance(default, BaseModel) or default is PydanticUndefined:
        return ""
    return f"`{json.dumps(default, default=list)}`"


def _number(value: float) -> str:
    """An integer as it is, also one stored as a float (2**32, 0.0)."""
    return str(int(value)) if float(value).is_integer() else str(value)
