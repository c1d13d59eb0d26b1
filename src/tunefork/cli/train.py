"""`tunefork train`: one method, one run."""

from pathlib import Path
from typing import Annotated

import typer

from tunefork.cli.arguments import AsJson, IgnorePlan, RecipeFile, Sets, load_recipe


def train(
    recipe: RecipeFile,
    out: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/NAME-OF-THE-RECIPE-METHOD")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="lora, qlora or full; beats the recipe's `method`.")
    ] = None,
    sets: Sets = None,
    ignore_plan: IgnorePlan = False,
    as_json: AsJson = False,
) -> None:
    """Train by one method, save the adapter or model, evaluate it.

    Stopped (Ctrl-C, SIGTERM, SIGUSR1) or killed, the same command goes on from there. Stopped while
    it trains, it also saves what was learnt so far, and does not evaluate that.
    """
    resolved = load_recipe(recipe, [*(sets or []), *([f"method={method}"] if method else [])])
    from rich.console import Console

    from tunefork.cli.record import print_record
    from tunefork.trial.trial import train_run

    folder = out or Path("runs") / f"{recipe.stem}-{resolved.method}"
    record = train_run(
        resolved,
        folder,
        say=lambda line: typer.echo(line, err=True),
        ignore_plan=ignore_plan,
    )
    if as_json:
        typer.echo(record.model_dump_json(indent=2))
    else:
        print_record(record, folder, Console())
    if record.status == "interrupted":
        raise typer.Exit(130)
