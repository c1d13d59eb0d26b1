"""LoRA, QLoRA or full fine-tuning? Train all three, compare them fairly, get the answer.

The Python API mirrors the command line's verbs; what it needs is imported when it is called.

    import tunefork

    recipe = tunefork.load_recipe("recipe.yaml")
    comparison = tunefork.compare(recipe, "runs/mine")
    print(comparison.verdict.text)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunefork.compare.comparison import Comparison
    from tunefork.recipe import Recipe
    from tunefork.registry.opening import Opened
    from tunefork.registry.run import RunRecord

__all__ = ["check_data", "compare", "evaluate", "load_recipe", "open_model", "runs", "train"]


def load_recipe(file: str | Path, *overrides: str) -> Recipe:
    """Read a recipe file; `overrides` such as "lora.rank=32" beat it. Raises RecipeError."""
    from tunefork.recipe import load

    return load(Path(file), overrides)


def compare(recipe: Recipe | str | Path, out: str | Path) -> Comparison:
    """Train by every method in `recipe.compare`, evaluate, judge; results land in `out`.

    Each method runs in a process of its own. Raises TuneforkError and its subclasses.
    """
    from tunefork.compare.compare import compare as run

    return run(_recipe(recipe), Path(out))


def train(recipe: Recipe | str | Path, out: str | Path) -> RunRecord:
    """Train by `recipe.method` in the run folder `out`, and evaluate. Raises TuneforkError."""
    from tunefork.compare.trial import train_run

    return train_run(_recipe(recipe), Path(out))


def evaluate(
    target: str | Path, recipe: Recipe | str | Path
) -> dict[str, tuple[float, float, float]]:
    """Each metric's value, low and high end for a run, adapter or model. Raises TuneforkError."""
    from tunefork.compare.trial import evaluate_target

    return evaluate_target(str(target), _recipe(recipe))


def check_data(recipe: Recipe | str | Path) -> dict[str, Any]:
    """What `tunefork data check --json` prints; `errors` says what would stop a run.

    Raises DataError only where a file cannot be read at all or the recipe does not suit it.
    """
    from tunefork.data.check import check
    from tunefork.model.load import load_tokenizer

    resolved = _recipe(recipe)
    return check(resolved, load_tokenizer(resolved.model)).as_dict()


def open_model(target: str | Path) -> Opened:
    """The model and tokenizer of a run, an adapter folder or a model id, ready for inference."""
    from tunefork.registry.opening import open_model as run

    return run(str(target))


def runs(folder: str | Path = "runs") -> list[tuple[Path, RunRecord]]:
    """Finished runs below `folder`."""
    from tunefork.registry.run import find_runs

    return find_runs(Path(folder))


def _recipe(recipe: Recipe | str | Path) -> Recipe:
    return load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
