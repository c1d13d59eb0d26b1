"""`tunefork recipe schema` and `tunefork recipe show`."""

import typer

from tunefork.cli.arguments import RecipeFile, Sets, load_recipe

recipe = typer.Typer(
    help="The recipe's schema, and a recipe with its defaults.", no_args_is_help=True
)


@recipe.command()
def schema() -> None:
    """Print the JSON schema of a recipe."""
    import json

    from tunefork.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@recipe.command()
def show(recipe: RecipeFile, sets: Sets = None) -> None:
    """Print a recipe with every default filled in."""
    from tunefork.recipe_file import dump

    typer.echo(dump(load_recipe(recipe, sets)), nl=False)
