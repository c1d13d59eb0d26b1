"""`tunefork compare`: LoRA, QLoRA and full fine-tuning on one's own data, and an answer."""

from pathlib import Path
from typing import Annotated

import typer

from tunefork.cli.arguments import AsJson, IgnorePlan, RecipeFile, Sets, load_recipe


def compare(
    recipe: RecipeFile,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results.", show_default="runs/NAME-OF-THE-RECIPE"),
    ] = None,
    sets: Sets = None,
    ignore_plan: IgnorePlan = False,
    as_json: AsJson = False,
) -> None:
    """Train by LoRA, QLoRA and full fine-tuning, evaluate all and the base, say which to choose.

    Ends with a table; DIR/report.html and DIR/comparison.json hold the rest. The same command goes
    on where it was stopped.
    """
    resolved = load_recipe(recipe, sets)
    from tunefork.compare.compare import COMPARISON, REPORT
    from tunefork.compare.compare import compare as run
    from tunefork.compare.table import print_comparison

    folder = out or Path("runs") / recipe.stem
    comparison = run(
        resolved,
        folder,
        say=lambda line: typer.echo(line, err=True),
        ignore_plan=ignore_plan,
    )
    if as_json:
        typer.echo((folder / COMPARISON).read_text(encoding="utf-8"))
    else:
        print_comparison(comparison, folder / REPORT)
