"""From one recipe to the variants of its sweep: each a recipe of its own, with a name.

A grid has every combination of the values listed; a random search some of them, each with every
seed. A *configuration* is what variants have in common that differ in the seed alone: it is what is
ranked, dropped and recommended.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunefork.errors import RecipeError
from tunefork.page.units import rate_text
from tunefork.recipe import Method, Recipe, SweepSection

Value = int | float | str | tuple[str, ...]

KNOBS: dict[str, tuple[str, str]] = {
    "rank": ("lora", "rank"),
    "alpha": ("lora", "alpha"),
    "scaling": ("lora", "scaling"),
    "targets": ("lora", "targets"),
    "dropout": ("lora", "dropout"),
    "data": ("data", "train"),
    "batch_size": ("train", "batch_size"),
    "epochs": ("train", "epochs"),
    "max_steps": ("train", "max_steps"),
    "schedule": ("train", "schedule"),
    "warmup_share": ("train", "warmup_share"),
    "weight_decay": ("train", "weight_decay"),
    "learning_rate": ("train", "learning_rate"),
    "seed": ("train", "seed"),
}
"""Field of the recipe's `sweep` -> the section and field that it varies; in a name's order."""

_MARKS = {
    "rank": "r",
    "alpha": "a",
    "dropout": "drop",
    "batch_size": "b",
    "epochs": "e",
    "max_steps": "n",
    "warmup_share": "w",
    "weight_decay": "wd",
    "learning_rate": "lr",
    "seed": "s",
}
_MOST = 4096
"""Variants of one sweep: more is a slip of the pen."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One run of a sweep."""

    name: str
    """Unique in the sweep, and a folder's name: `r8-lr1e-4-s0`."""
    configuration: str
    """The name without the seed."""
    recipe: Recipe
    """What `tunefork train` would take to train it alone."""
    values: dict[str, Value] = field(default_factory=dict)
    """Of the knobs that the sweep turns."""


def variants(recipe: Recipe) -> list[Variant]:
    """The variants of `recipe.sweep`, in the order in which they are trained.

    Raises RecipeError where nothing is varied, or where what is varied cannot be compared.
    """
    lists = varied(recipe.sweep)
    _check(recipe, lists)
    lists.pop("seed", None)
    seeds = recipe.sweep.seed or (recipe.train.seed,)
    chosen = list(_combinations(lists, recipe.sweep))
    if len(chosen) * len(seeds) > _MOST:
        raise RecipeError(
            f"sweep: makes {len(chosen) * len(seeds):,} variants; at most {_MOST:,}: shorten the "
            "lists, or draw some of them (sweep.search: random, sweep.count)"
        )
    names = _unique([_name(values) for values in chosen])
    found = []
    for configuration, values in zip(names, chosen, strict=True):
        for seed in seeds:
            own: dict[str, Value] = values | {"seed": seed} if recipe.sweep.seed else dict(values)
            name = f"{configuration}-s{seed}" if recipe.sweep.seed else configuration
            found.append(
                Variant(name.lstrip("-"), configuration, _recipe(recipe, values, seed), own)
            )
    return found


def varied(section: SweepSection) -> dict[str, tuple[Value, ...]]:
    """Knob -> its values, of those that the sweep turns."""
    return {knob: values for knob in KNOBS if (values := getattr(section, knob))}


def _check(recipe: Recipe, lists: dict[str, tuple[Value, ...]]) -> None:
    if recipe.method is Method.FULL:
        raise RecipeError(
            "method: full trains every weight of the base, so that no two variants can share one; "
            "sweep lora or qlora (--set method=lora), or let `tunefork compare` search full's "
            "learning rate"
        )
    if not lists:
        raise RecipeError(
            f"sweep: varies nothing; list values of some of {', '.join(KNOBS)}, in the recipe "
            "(sweep: {rank: [8, 16]}) or here (--rank 8,16 --lr 1e-4,2e-4)"
        )
    if recipe.train.learning_rate is not None and recipe.sweep.learning_rate:
        raise RecipeError(
            f"train.learning_rate: {recipe.train.learning_rate:g} is one rate, and "
            "sweep.learning_rate lists several; leave one of the two out"
        )
    if recipe.sweep.data and recipe.data.eval is None:
        raise RecipeError(
            "sweep.data: each mixture would be judged on examples cut off itself; give data.eval, "
            "which judges all of them"
        )


def _combinations(
    lists: dict[str, tuple[Value, ...]], section: SweepSection
) -> Iterator[dict[str, Value]]:
    """Of the values listed, all or as many as are drawn, in the grid's order."""
    sizes = [len(values) for values in lists.values()]
    total = math.prod(sizes)
    if section.count is None:
        places: Iterator[int] | list[int] = iter(range(min(total, _MOST + 1)))
    else:
        rng = np.random.default_rng(section.search_seed)
        places = sorted(rng.choice(total, size=min(section.count, total), replace=False).tolist())
    for place in places:
        at = np.unravel_index(place, sizes) if sizes else ()
        yield {knob: values[int(i)] for (knob, values), i in zip(lists.items(), at, strict=True)}


def _recipe(recipe: Recipe, values: dict[str, Value], seed: int) -> Recipe:
    """The recipe of one variant: what is swept put in its place, and nothing left to sweep."""
    update: dict[str, dict[str, Any]] = {
        "data": {"seed": recipe.data_seed},
        "train": {"seed": seed, "learning_rate": recipe.learning_rate(recipe.method)},
        "lora": {},
    }
    for knob, value in values.items():
        section, name = KNOBS[knob]
        update[section][name] = value
    sections: dict[str, Any] = {
        name: getattr(recipe, name).model_copy(update=fields) for name, fields in update.items()
    }
    return recipe.model_copy(update=sections | {"sweep": SweepSection()})


def value_text(knob: str, value: Value) -> str:
    """A knob's value for people: `1e-4`, `q_proj+v_proj`, `0.05`."""
    if isinstance(value, tuple):
        return "+".join(value)
    if knob == "learning_rate":
        return rate_text(float(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _name(values: dict[str, Value]) -> str:
    """`r8-lr1e-4`"""
    parts = []
    for knob, value in values.items():
        text = Path(str(value)).stem if knob == "data" else value_text(knob, value)
        parts.append(_MARKS.get(knob, "") + text)
    return re.sub(r"[^A-Za-z0-9.+_-]", "_", "-".join(parts))[:80]


def _unique(names: list[str]) -> list[str]:
    """`names`, those that stand twice numbered (data files of one name in two folders)."""
    seen = itertools.count(1)
    return [f"{n}.{next(seen)}" if names.count(n) > 1 else n for n in names]
