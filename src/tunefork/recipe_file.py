"""A recipe read from its file and written back: overrides, paths, and every error in plain words.

Paths in a file are relative to its folder. Unknown keys are errors that name the nearest right one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunefork.errors import RecipeError, nearest
from tunefork.recipe import Recipe
from tunefork.yaml_text import Dumper, read_yaml


def load(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file; `overrides` are `a.b=c` strings that beat the file.

    Data and model paths in the file are relative to its folder and come back absolute.
    Raises RecipeError with every wrong field, or with file:line where it is not YAML.
    """
    fields = read_fields(path)
    for override in overrides:
        _override(fields, override)
    keys = [override.partition("=")[0].strip() for override in overrides]
    return parse(absolute(fields, path.resolve().parent), where=str(path), overridden=keys)


def load_of_run(path: Path) -> Recipe:
    """The recipe in the folder of a run that has ended, as `load` reads it. `fp8`, a precision of
    before int8's, is left out: what was trained in it is opened and served as ever."""
    fields = read_fields(path)
    train = fields.get("train")
    if isinstance(train, dict) and train.get("precision") == "fp8":
        del train["precision"]
    return parse(absolute(fields, path.resolve().parent), where=str(path))


def read_fields(path: Path) -> dict[str, Any]:
    """A recipe file's sections, not yet validated. Raises RecipeError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); give a recipe file") from error
    fields = read_yaml(text, str(path))
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: must be a mapping of sections (model, data, ...)")
    return fields


def anchor(recipe: Recipe, folder: Path) -> Recipe:
    """`recipe` with its relative paths made absolute, from `folder`, as `load` does."""
    return parse(absolute(recipe.model_dump(mode="json"), folder.resolve()))


def relative(recipe: Recipe, folder: Path) -> Recipe:
    """`recipe` with paths below `folder` made relative to it: for reports that others read."""
    base = folder.resolve()

    def shorten(value: str) -> str:
        path = Path(value)
        is_below = path.is_absolute() and path.is_relative_to(base)
        return path.relative_to(base).as_posix() if is_below else value

    return parse(_with_paths(recipe.model_dump(mode="json"), shorten))


def parse(fields: dict[str, Any], where: str = "recipe", overridden: Sequence[str] = ()) -> Recipe:
    """Validate `fields`; raises RecipeError naming each wrong field under `where`, or under the
    command line where it is one of the keys `overridden`."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        lines = dict.fromkeys(
            f"{'command line' if _is_overridden(detail, overridden) else where}: {_explain(detail)}"
            for detail in error.errors()
        )
        raise RecipeError("\n".join(lines)) from error


def _is_overridden(detail: ErrorDetails, keys: Sequence[str]) -> bool:
    """Whether the command line gave what pydantic complains of."""
    at = _field(detail) + "."
    is_unknown = detail["type"] == "extra_forbidden"  # and may be a section that a --set made
    return any(at.startswith(f"{key}.") or (is_unknown and key.startswith(at)) for key in keys)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included; `load` reads it back to an equal recipe."""
    fields = recipe.model_dump(mode="json")
    return yaml.dump(fields, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _override(fields: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` to `fields` in place; the value is read as YAML."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: write KEY=VALUE, for example --set lora.rank=32")
    *path, last = key.strip().split(".")
    at = fields
    for name in path:
        if isinstance(at.get(name), str) and name == "model":
            at[name] = {"id": at[name]}
        at = at.setdefault(name, {})
        if not isinstance(at, dict):
            raise RecipeError(f"--set {override}: {name!r} is not a section")
    at[last] = read_yaml(value, f"--set {key}")


def absolute(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`fields`, not yet validated, with those paths absolute that exist under `folder` or look
    like files."""

    def resolve(value: str) -> str:
        try:
            path = folder / Path(value).expanduser()
            is_path = path.suffix in _FILE_SUFFIXES or value.startswith((".", "~", "/"))
            return str(path.resolve()) if is_path or path.exists() else value
        except (OSError, RuntimeError, ValueError):  # too long, ~ of nobody, a NUL: no path
            return value

    return _with_paths(fields, resolve)


def _with_paths(fields: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """`fields` of a recipe, not yet validated, with `change` applied to what may be a path."""
    fields = dict(fields)
    if isinstance(fields.get("model"), str):
        fields["model"] = {"id": fields["model"]}
    for section, keys in _PATHS.items():
        inner = fields.get(section)
        if isinstance(inner, dict):
            keywords = KEYWORDS.get(section, ())
            fields[section] = inner | {
                key: _changed(inner[key], change, keywords) for key in keys if key in inner
            }
    return fields


def _changed(value: Any, change: Callable[[str], str], keywords: tuple[str, ...]) -> Any:
    """`value`, or each value of a list, changed where it is text and no keyword."""
    if isinstance(value, list):
        return [_changed(each, change, keywords) for each in value]
    return change(value) if isinstance(value, str) and value not in keywords else value


KEYWORDS = {"model": ("smollm2-135m-instruct",), "evaluate": ("general",)}
"""Values that mean the same in every folder, also where a file there is called so (`./general`
names that one): the packaged models and the packaged general text."""
_PATHS = {
    "model": ("id",),
    "data": ("train", "eval"),
    "evaluate": ("forgetting",),
    "sweep": ("data",),
}
_FILE_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".txt", ".gguf"}


def _explain(detail: ErrorDetails) -> str:
    """One line for one of pydantic's findings: the field, what was found, what is allowed."""
    at = _field(detail)
    found, kind = detail["input"], detail["type"]
    if kind == "extra_forbidden":
        allowed = _fields_at(detail["loc"][:-1])
        hint = nearest(str(detail["loc"][-1]), allowed) or "; allowed: " + ", ".join(allowed)
        return f"{at}: unknown key{hint}"
    if kind == "missing":
        return f"{at}: is missing; it has no default"
    if kind == "model_type":
        return f"{at}: must hold some of the keys {', '.join(_fields_at(detail['loc']))}"
    if kind == "value_error":  # raised by a section about one field, or by the recipe about several
        message = detail["msg"].removeprefix("Value error, ")
        return f"{at}: {message}" if at else message
    is_scalar = isinstance(found, str | int | float | bool | None)
    hint = "; put it in quotes" if kind == "string_type" and is_scalar else ""
    if kind in ("literal_error", "enum") and isinstance(found, str):
        allowed = detail.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ")
        hint = nearest(found, allowed.split(", "))
    message = PLAIN.get(kind) or detail["msg"].removeprefix("Input ")
    return f"{at}: {message}{f' (found {found!r})' if is_scalar else ''}{hint}"


def _field(detail: ErrorDetails) -> str:
    """Such as `lora.rank`."""
    return ".".join(part for part in map(str, detail["loc"]) if not part.startswith(_NO_FIELDS))


_NO_FIELDS = ("literal[", "tuple[", "[key]")
"""Parts of pydantic's locations that name a choice of types, not a field."""
PLAIN = {
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_parsing": "should be a number",
    "bool_parsing": "should be true or false",
}
"""Words for those who write YAML, not Python."""


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields allowed in the section at `location`."""
    section: type[BaseModel] = Recipe
    for name in location:
        annotation = section.model_fields[str(name)].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
