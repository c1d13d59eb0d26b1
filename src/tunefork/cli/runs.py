"""`tunefork runs`: what was trained."""

from pathlib import Path
from typing import Annotated

import typer

from tunefork.cli.arguments import AsJson


def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look for runs.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs below a folder.

    Status: ok; trained (not evaluated yet) and interrupted (stopped while it trained): the same
    command goes on; failed (training ended in an error, which run.json tells).
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from tunefork.errors import RunFolderError
    from tunefork.registry.run import find_runs

    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such folder; give the folder that holds runs")
    found = find_runs(folder, say=lambda line: typer.echo(line, err=True))
    if as_json:
        rows = [{"folder": str(at)} | record.model_dump(mode="json") for at, record in found]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(
        "run", "method", "status", "learning rate", "loss", "accuracy", "created", box=None
    )
    for at, record in found:
        figures = (record.metrics.get(name) for name in ("loss", "accuracy"))
        table.add_row(
            str(at),
            record.method or "base",
            record.status,
            "" if record.learning_rate is None else f"{record.learning_rate:g}",
            *("" if figure is None else f"{figure[0]:.3f}" for figure in figures),
            record.created,
        )
    Console(soft_wrap=True).print(table)
