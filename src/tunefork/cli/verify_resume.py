"""`tunefork verify-resume`: whether a stopped run goes on with the same bits, on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from tunefork.cli.arguments import AsJson, RecipeFile, Sets, load_recipe


def verify_resume(
    recipe: RecipeFile,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps before the stop, and as many after it.")
    ] = 3,
    method: Annotated[
        str | None, typer.Option(help="lora, qlora or full; beats the recipe's `method`.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for both runs' states.", show_default="a temporary one, removed"),
    ] = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Run 2N steps, and N, a stop, and N more; compare every bit of what they leave.

    Ends with status 1 at a difference, and shows the first. On a GPU, set train.deterministic=true.
    """
    resolved = load_recipe(recipe, [*(sets or []), *([f"method={method}"] if method else [])])
    import json
    import tempfile
    from dataclasses import asdict

    from tunefork.compare.verify_resume import verify_resume as verify

    with tempfile.TemporaryDirectory() as scratch:
        verdict = verify(
            resolved,
            out or Path(scratch),
            steps=steps,
            say=lambda line: typer.echo(line, err=True),
        )
    if as_json:
        typer.echo(json.dumps(asdict(verdict), indent=2))
    else:
        for part, (whole, stopped) in verdict.hashes.items():
            same = "the same" if whole == stopped else f"{stopped[:16]} after a stop"
            typer.echo(f"{part:<9} {whole[:16]}  {same}")
        if verdict.difference is None:
            typer.echo(f"{verdict.method}: {verdict.steps} steps, bit for bit the same")
    difference = verdict.difference
    if difference is not None:
        at = "" if difference.index is None else f"[{', '.join(map(str, difference.index))}]"
        typer.echo(
            f"{verdict.method}: {difference.num_tensors} tensors differ, first "
            f"{difference.name}{at}: {difference.left} without a stop, {difference.right} with",
            err=True,
        )
        raise typer.Exit(1)
