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


KeyVariable = Annotated[
    str | None, typer.Option(metavar="VAR", help="Environment variable with the API key.")
]


def check_server(url: str) -> str:
    """`url`, the address of an OpenAI server. Raises BadInputError."""
    from tunefork.errors import BadInputError
    from tunefork.serve.event_stream import Address

    try:
        Address.parse(url)
    except ValueError as error:
        raise BadInputError(f"--server: {error}; give http://127.0.0.1:8000") from error
    return url


def read_key(variable: str | None) -> str | None:
    """The API key in the environment variable of this name. Raises BadInputError."""
    import os

    from tunefork.errors import BadInputError

    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or not key.isprintable():
        raise BadInputError(f"--key-env: the environment variable {variable} holds no key")
    return key
