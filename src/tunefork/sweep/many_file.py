"""What `tunefork train-many` trains: a file with a shared recipe and a list of entries, or a folder
of recipes.

    recipe: base.yaml              # a recipe file, or the sections themselves
    adapters:
      - name: acme                 # its run folder
        publish: support/acme      # optional: the store's name, once it is done
        tags: [prod]
        data: {train: acme.jsonl}  # any section of a recipe; what is given here beats the shared
        lora: {rank: 8}

Paths are relative to the file that they stand in. All adapters share one base and what decides how
a pass over it runs (`SHARED`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tunefork.errors import RecipeError, nearest
from tunefork.recipe import Recipe, SweepSection
from tunefork.recipe_file import absolute, load, parse, read_fields
from tunefork.registry.run import write_atomically
from tunefork.sweep.entries import Entry, check_entries
from tunefork.yaml_text import Loader

_SECTIONS = [name for name in Recipe.model_fields if name not in ("model", "method", "sweep")]
_OWN = ("name", "publish", "tags")


_ENTRIES = TypeAdapter(list[Entry])


class _Head(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    publish: str | None = None
    tags: list[str] = []


def load_many(path: Path, prefix: str | None = None) -> list[Entry]:
    """The entries of a file or a folder; `prefix` publishes those that name no name as
    PREFIX/NAME.

    Raises RecipeError, naming file:line and field, for all that is wrong with the entries.
    """
    entries = _folder(path) if path.is_dir() else _file(path)
    if not entries:
        raise RecipeError(f"{path}: names no adapter to train")
    if prefix is not None:
        entries = [
            e if e.publish else e.model_copy(update={"publish": f"{prefix}/{e.name.lower()}"})
            for e in entries
        ]
    check_entries(entries)
    return entries


def save_entries(entries: Sequence[Entry], file: Path) -> None:
    """Write what was asked for, resolved, to go on from without the file it came from."""
    write_atomically(file, _ENTRIES.dump_json(list(entries), indent=1).decode() + "\n")


def load_entries(file: Path) -> list[Entry]:
    """Read what `save_entries` wrote. Raises RecipeError."""
    try:
        return _ENTRIES.validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise RecipeError(
            f"{file}: does not say what was begun; give the file of entries again, with --out "
            f"{file.parent}"
        ) from error


def _folder(path: Path) -> list[Entry]:
    files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    if not files:
        raise RecipeError(f"{path}: holds no recipe (*.yaml)")
    found, errors = [], []
    for file in files:
        try:
            found.append(Entry(name=file.stem, recipe=_plain(load(file)), where=str(file)))
        except RecipeError as error:
            errors.append(str(error))
    if errors:
        raise RecipeError("\n".join(errors))
    return found


def _file(path: Path) -> list[Entry]:
    fields = read_fields(path)
    if unknown := [key for key in fields if key not in ("recipe", "adapters")]:
        hint = nearest(str(unknown[0]), ["recipe", "adapters"])
        raise RecipeError(f"{path}: {unknown[0]}: unknown key{hint}; there are recipe and adapters")
    listed = fields.get("adapters")
    if not isinstance(listed, list):
        raise RecipeError(f"{path}: adapters: must be a list of entries, each with a name")
    shared, lines = _shared(fields.get("recipe"), path), _lines(path)
    found, errors = [], []
    for line, entry in zip(lines, listed, strict=True):
        try:
            found.append(_entry(entry, shared, path, f"{path}:{line}"))
        except RecipeError as error:
            errors.append(str(error))
    if errors:
        raise RecipeError("\n".join(errors))
    return found


def _shared(given: Any, path: Path) -> dict[str, Any]:
    """The sections that all entries start from, their paths absolute."""
    if isinstance(given, str):
        file = path.parent / given
        return absolute(read_fields(file), file.resolve().parent)
    if isinstance(given, dict):
        return absolute(given, path.resolve().parent)
    raise RecipeError(f"{path}: recipe: must name a recipe file, or hold its sections")


def _entry(entry: Any, shared: dict[str, Any], path: Path, where: str) -> Entry:
    if not isinstance(entry, dict):
        raise RecipeError(f"{where}: must be a mapping with a name and the sections that differ")
    for key in entry:
        if key in ("model", "method", "sweep"):
            raise RecipeError(f"{where}: {key}: is the same for all adapters; put it in recipe")
        if key not in _SECTIONS and key not in _OWN:
            allowed = [*_OWN, *_SECTIONS]
            hint = nearest(str(key), allowed) or f"; allowed: {', '.join(allowed)}"
            raise RecipeError(f"{where}: {key}: unknown key{hint}")
    try:
        head = _Head.model_validate({key: entry[key] for key in _OWN if key in entry})
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise RecipeError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    own = absolute({k: v for k, v in entry.items() if k not in _OWN}, path.resolve().parent)
    merged = dict(shared)
    for section, fields in own.items():
        old = merged.get(section)
        is_mapping = isinstance(fields, dict) and isinstance(old, dict | None)
        merged[section] = {**(old or {}), **fields} if is_mapping else fields
    recipe = parse(merged, where=f"{where} ({head.name})")
    return Entry(
        name=head.name,
        recipe=_plain(recipe),
        where=where,
        publish=head.publish,
        tags=tuple(head.tags),
    )


def _plain(recipe: Recipe) -> Recipe:
    """As `tunefork train` would resolve it alone."""
    rate = recipe.learning_rate(recipe.method)
    train = recipe.train.model_copy(update={"learning_rate": rate})
    return recipe.model_copy(update={"train": train, "sweep": SweepSection()})


def _lines(path: Path) -> list[int]:
    """The line of each entry of `adapters`."""
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=Loader)
    assert isinstance(root, yaml.MappingNode)
    for key, value in root.value:
        if key.value == "adapters":
            return [node.start_mark.line + 1 for node in value.value]
    return []
