"""Arguments that several verbs share, and the recipe that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tunefork.recipe import Recipe

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe field: --set lora.rank=32"),
]
IgnorePlan = Annotated[
    bool, typer.Option("--ignore-plan", help="Run although the plan says that it cannot fit.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def load_recipe(file: Path, sets: list[str] | None) -> Recipe:
    """The recipe of `file` with its overrides."""
    from tunefork.recipe_file import load

    return load(file, tuple(sets or ()))
