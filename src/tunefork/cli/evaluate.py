"""`tunefork evaluate`: any model on a recipe's evaluation examples."""

from typing import Annotated

import typer

from tunefork.cli.arguments import AsJson, RecipeFile, Sets, load_recipe

Target = Annotated[
    str, typer.Argument(metavar="RUN_OR_MODEL", help="A run or adapter folder, or a model.")
]


def evaluate(
    target: Target, recipe: RecipeFile, sets: Sets = None, as_json: AsJson = False
) -> None:
    """Measure a run, an adapter or a model on a recipe's evaluation examples."""
    import json

    resolved = load_recipe(recipe, sets)
    from rich.console import Console

    from tunefork.cli.record import print_metrics
    from tunefork.trial.trial import evaluate_target

    metrics = evaluate_target(target, resolved, say=lambda line: typer.echo(line, err=True))
    if as_json:
        rows = {n: dict(zip(("value", "low", "high"), m, strict=True)) for n, m in metrics.items()}
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_metrics(metrics, Console())
