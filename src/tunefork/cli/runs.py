"""`tunefork runs`: what was trained."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tunefork.cli.arguments import AsJson


def runs(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Where to look for runs.", show_default="all that is known, and ./runs"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs below a folder or, without one, every run made on this machine.

    Status: ok; trained (not evaluated yet) and interrupted (stopped while it trained): the same
    command goes on; failed (training ended in an error, which run.json tells). A run whose folder
    is gone is listed as it was.
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from tunefork.errors import RunFolderError

    found = _below(folder) if folder else _known()
    if folder is None and Path("runs").is_dir():
        found = {key: row for key, row in found.items() if not _is_below(key)} | _below(
            Path("runs")
        )
    if folder is None and not found and not Path("runs").is_dir():
        raise RunFolderError("runs: no such folder; give the folder that holds runs")
    if as_json:
        typer.echo(json.dumps([{"folder": at} | row for at, row in found.items()], indent=2))
        return
    table = Table(
        "run", "method", "status", "learning rate", "loss", "accuracy", "created", box=None
    )
    for at, row in found.items():
        figures = (row["metrics"].get(name) for name in ("loss", "accuracy"))
        table.add_row(
            at if Path(at).is_dir() else f"{at} (folder is gone)",
            row["method"] or "base",
            row["status"],
            "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
            *("" if figure is None else f"{figure[0]:.3f}" for figure in figures),
            row["created"],
        )
    Console(soft_wrap=True).print(table)


def _below(folder: Path) -> dict[str, dict[str, Any]]:
    """Records of the runs below `folder`, by their folder."""
    from tunefork.errors import RunFolderError
    from tunefork.registry.run import find_runs

    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such folder; give the folder that holds runs")
    found = find_runs(folder, say=lambda line: typer.echo(line, err=True))
    return {str(at): record.model_dump(mode="json") for at, record in found}


def _known() -> dict[str, dict[str, Any]]:
    """What the store remembers, or nothing and a line on stderr where it cannot be opened."""
    from tunefork.errors import StoreError
    from tunefork.registry.history import known_runs
    from tunefork.registry.store import Store

    try:
        with Store.open() as store:
            return {str(run.folder): run.content for run in known_runs(store)}
    except StoreError as error:
        typer.echo(f"warning: {error}", err=True)
        return {}


def _is_below(folder: str) -> bool:
    """Whether a remembered run lies below ./runs, where it is read from its folder instead."""
    return Path(folder).is_relative_to(Path("runs").resolve()) and Path(folder).is_dir()
