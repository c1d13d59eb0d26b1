"""The token sequences that an export is proven on, and the tokenizer that made them.

A run's own evaluation examples where its recipe can still be read, because they are what it will be
asked; the packaged general text otherwise.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.data.loader import load_data
from tunefork.errors import DataError
from tunefork.evaluate.forgetting import GENERAL, encode_each
from tunefork.recipe import Recipe
from tunefork.recipe_file import load_of_run
from tunefork.registry.opening import Parts
from tunefork.registry.run import RECIPE


@dataclass(frozen=True, slots=True)
class Prompts:
    """What both models read."""

    sequences: list[list[int]]
    source: str
    """Where they come from, for the proof and the card."""


def recipe_of(parts: Parts) -> Recipe | None:
    """The recipe of the run behind `parts`, if it is a run's."""
    if parts.run is None:
        return None
    for folder in (parts.run, *parts.run.parents[:2]):
        if (folder / RECIPE).is_file():
            return load_of_run(folder / RECIPE)
    return None


def find_prompts(
    parts: Parts, tokenizer: Any, recipe: Recipe | None, *, num_tokens: int
) -> Prompts:
    """About `num_tokens` tokens of the evaluation examples of `recipe`, or of the general text.

    Without a recipe, the run's own counts, unless its data are gone.
    """
    own = recipe_of(parts) if recipe is None else None
    if recipe is not None:
        return _of_recipe(recipe, tokenizer, num_tokens)
    if own is not None:
        try:
            return _of_recipe(own, tokenizer, num_tokens)
        except DataError:
            note = f"packaged general text (the data of {parts.run} cannot be read any more)"
            return Prompts(_general(tokenizer, num_tokens), note)
    return Prompts(_general(tokenizer, num_tokens), "packaged general text")


def _of_recipe(recipe: Recipe, tokenizer: Any, num_tokens: int) -> Prompts:
    data = load_data(recipe, tokenizer)
    sequences = _first((e.input_ids.tolist() for e in data.eval), num_tokens)
    name = Path(recipe.data.eval or recipe.data.train).name
    return Prompts(sequences, f"{len(sequences)} evaluation examples of {name}")


def _general(tokenizer: Any, num_tokens: int) -> list[list[int]]:
    return _first((p.input_ids.tolist() for p in encode_each(tokenizer, GENERAL)), num_tokens)


def _first(sequences: Iterable[list[int]], num_tokens: int) -> list[list[int]]:
    """Whole sequences until there are `num_tokens`, at least one."""
    found, total = list[list[int]](), 0
    for sequence in sequences:
        found.append(sequence)
        total += len(sequence)
        if total >= num_tokens:
            break
    return found
