"""YAML or JSON files against a pydantic schema, with errors that name file and field.

The catalogue and the advice's situation are read by this; a recipe has richer rules of its own.
"""

from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunefork.errors import BadInputError, RecipeError, nearest
from tunefork.recipe_file import PLAIN
from tunefork.yaml_text import read_yaml

Schema = TypeVar("Schema", bound=BaseModel)


def read_fields(path: Path, what: str) -> Any:
    """The plain values of a YAML or JSON file (JSON is YAML); `what` names it in errors.

    Raises BadInputError where it cannot be read, or with file:line where it is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: cannot be read ({error}); give {what}") from error
    try:
        return read_yaml(text, str(path))
    except RecipeError as error:
        raise BadInputError(str(error)) from error


def validate(schema: type[Schema], fields: Any, where: str) -> Schema:
    """`fields` as a `schema`; raises BadInputError with a line for each wrong field."""
    if not isinstance(fields, dict):
        keys = ", ".join(schema.model_fields)
        raise BadInputError(f"{where}: must be a mapping with some of the keys {keys}")
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        lines = [_explain(detail, schema) for detail in error.errors()]
        raise BadInputError(
            "\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))
        ) from error


def _explain(detail: ErrorDetails, schema: type[BaseModel]) -> str:
    """One line for one finding: the field, what was found, what is allowed."""
    kind, found = detail["type"], detail["input"]
    path = [str(part) for part in detail["loc"]]
    at = ".".join(part for part in path if not part.startswith("function-"))
    if kind == "extra_forbidden":
        allowed = _fields_at(schema, detail["loc"][:-1])
        return f"{at}: unknown key{nearest(path[-1], allowed)}; allowed: {', '.join(allowed)}"
    if kind == "missing":
        return f"{at}: is missing; a new row needs it"
    if kind == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"{at}: {message}" if at else message
    message = PLAIN.get(kind) or detail["msg"].removeprefix("Input ")
    if kind in ("literal_error", "enum") and isinstance(found, str):
        allowed = detail.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ")
        message += nearest(found, allowed.split(", "))
    is_scalar = isinstance(found, str | int | float | bool | None)
    return f"{at}: {message}{f' (found {found!r})' if is_scalar else ''}"


def _fields_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields allowed in the part of `schema` at `location`."""
    part = schema
    for name in location:
        if isinstance(name, int):
            continue
        annotation = part.model_fields[name].annotation
        inner = [annotation, *get_args(annotation)]
        part = next(a for a in inner if isinstance(a, type) and issubclass(a, BaseModel))
    return list(part.model_fields)
