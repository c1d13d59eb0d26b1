"""`tunefork data check` and `tunefork data show`."""

from typing import Annotated

import typer

from tunefork.cli.arguments import AsJson, RecipeFile, Sets, load_recipe
from tunefork.errors import BadInputError

data = typer.Typer(help="Look at the data before training on it.", no_args_is_help=True)


@data.command()
def check(recipe: RecipeFile, sets: Sets = None, as_json: AsJson = False) -> None:
    """Count, measure and question the data; name every bad row by file:line.

    Exit status 2 where the data cannot be trained on as the recipe says.
    """
    import json

    resolved = load_recipe(recipe, sets)
    from tunefork.data.check import check as run
    from tunefork.data.check import render_report
    from tunefork.model.load import load_tokenizer

    report = run(resolved, load_tokenizer(resolved.model))
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else render_report(report))
    if report.errors:
        raise typer.Exit(BadInputError.exit_status)


@data.command()
def show(
    recipe: RecipeFile,
    row: Annotated[int, typer.Option(min=1, help="Which training example, from 1.")] = 1,
    sets: Sets = None,
) -> None:
    """Print a training example as the model sees it, supervised tokens marked."""
    resolved = load_recipe(recipe, sets)
    from rich.console import Console

    from tunefork.data.loader import load_data
    from tunefork.data.show import show as render
    from tunefork.model.load import load_tokenizer

    tokenizer = load_tokenizer(resolved.model)
    examples = load_data(resolved, tokenizer, need_eval=False).train
    if row > len(examples):
        raise BadInputError(f"--row: {row} is past the last of {len(examples)} training examples")
    shown = examples[row - 1]
    supervised = int(shown.supervised.sum())
    typer.echo(f"{shown.source}: {len(shown.input_ids)} tokens, {supervised} of them supervised")
    Console(soft_wrap=True).print(render(shown, tokenizer))
