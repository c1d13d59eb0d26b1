"""`tunefork plan`: memory, time and money of each method, before a GPU is rented."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunefork.cli.arguments import AsJson, Sets, load_recipe
from tunefork.errors import BadInputError, DataError, nearest

if TYPE_CHECKING:
    from tunefork.recipe import Method


def plan(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe file (YAML).")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="A GPU of the catalogue; given n times, n of them.", show_default="this machine"
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="lora, qlora, full or all.")] = "all",
    examples: Annotated[
        int | None, typer.Option(min=1, help="Training examples, where the data is not at hand.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of all of them, prompts included.")
    ] = None,
    catalogue: Annotated[
        Path | None, typer.Option(help="More GPUs and prices, or other ones (YAML).")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure a few short runs on this machine first.")
    ] = False,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe takes by each method: memory, time, money, and whether it fits.

    Needs neither a GPU nor the model's weights, only its configuration. Every figure is predicted.
    """
    if recipe is None and not calibrate:
        raise BadInputError("give a RECIPE to plan, or --calibrate to measure this machine")
    if calibrate:
        from tunefork.plan.calibrate import calibrate as run

        run(say=lambda line: typer.echo(line, err=True))
    if recipe is None:
        return
    resolved = load_recipe(recipe, sets)
    from tunefork.plan.batches import work_of
    from tunefork.plan.catalogue import load_catalogue
    from tunefork.plan.device import here, target_of
    from tunefork.plan.plan import plan_recipe

    known = load_catalogue(catalogue)
    target = target_of(known.machine(gpu)) if gpu else here(known, resolved.compare.usd_per_hour)
    work = work_of(resolved, examples=examples, tokens=tokens)
    try:
        planned = plan_recipe(
            resolved, target=target, methods=_methods(method), work=work, catalogue=known
        )
    except DataError as error:
        raise DataError(f"{error}\nWithout the data: give --examples and --tokens") from error
    if as_json:
        typer.echo(planned.model_dump_json(indent=2))
        return
    from tunefork.cli.plan_table import print_plan

    print_plan(planned)


def _methods(name: str) -> tuple[Method, ...]:
    from tunefork.recipe import Method

    if name == "all":
        return tuple(Method)
    allowed = [*(method.value for method in Method), "all"]
    if name not in allowed:
        hint = nearest(name, allowed) or f"; allowed: {', '.join(allowed)}"
        raise BadInputError(f"--method: {name} is no method{hint}")
    return (Method(name),)
