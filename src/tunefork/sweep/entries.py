"""One adapter of many, and what all of them must have in common."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from tunefork.errors import RecipeError, StoreError
from tunefork.recipe import Method, Recipe
from tunefork.registry.names import check_names

SHARED = (
    ("model",),
    ("method",),
    ("train", "precision"),
    ("train", "activation_checkpointing"),
    ("train", "compile"),
    ("train", "deterministic"),
    ("train", "packing"),
    ("train", "micro_batch_tokens"),
    ("train", "on_out_of_memory"),
    ("train", "checkpoint_every_s"),
    ("train", "checkpoint_every_steps"),
    ("train", "preemption_file"),
    ("train", "log_every_s"),
)
"""Fields that one pass over one base has one of."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}")


class Entry(BaseModel):
    """One adapter to train."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    recipe: Recipe
    where: str
    """file:line, or the recipe file."""
    publish: str | None = None
    """The name in the store."""
    tags: tuple[str, ...] = ()


def check_entries(entries: Sequence[Entry]) -> None:
    """Raise RecipeError, with every fault, unless these can train together."""
    errors = [*_repeated(entries), *_unshared(entries), *_unnamed(entries)]
    if errors:
        raise RecipeError("\n".join(errors))


def _repeated(entries: Sequence[Entry]) -> Iterator[str]:
    seen: dict[str, str] = {}
    published: dict[str, str] = {}
    for entry in entries:
        if entry.name in seen:
            yield f"{entry.where}: name: {entry.name} is taken by {seen[entry.name]}"
        seen.setdefault(entry.name, entry.where)
        if entry.publish is not None:
            if entry.publish in published:
                taken = published[entry.publish]
                yield f"{entry.where}: publish: {entry.publish} is taken by {taken}"
            published.setdefault(entry.publish, entry.where)


def _unshared(entries: Sequence[Entry]) -> Iterator[str]:
    first = entries[0]
    if first.recipe.method is Method.FULL:
        yield (
            f"{first.where}: method: full trains every weight of the base, which then cannot be "
            "shared; use lora or qlora, or `tunefork train` for each"
        )
    for entry in entries[1:]:
        for field in SHARED:
            own, other = _at(entry.recipe, field), _at(first.recipe, field)
            if own != other:
                shown = [getattr(value, "id", value) for value in (own, other)]
                yield (
                    f"{entry.where}: {'.'.join(field)}: {shown[0]}, but {first.where} has "
                    f"{shown[1]}; adapters that train together have one"
                )


def _unnamed(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        if not _NAME.fullmatch(entry.name) or entry.name.endswith(".json"):
            yield (
                f"{entry.where}: name: must be 1 to 80 of letters, digits, '.', '_', '+' and '-', "
                "beginning with a letter or digit, and not end in .json: it becomes a folder"
            )
        if entry.publish is not None:
            try:
                check_names(entry.publish, entry.tags)
            except StoreError as error:
                yield f"{entry.where}: publish: {error}"
        elif entry.tags:
            yield f"{entry.where}: tags: belong to a version in the store; give publish too"


def _at(recipe: Recipe, field: tuple[str, ...]) -> Any:
    value: Any = recipe
    for name in field:
        value = getattr(value, name)
    return value
