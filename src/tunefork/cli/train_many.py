"""`tunefork train-many`: an adapter for each of many customers, trained in one pass."""

from pathlib import Path
from typing import Annotated

import typer

from tunefork.cli.arguments import AsJson, IgnorePlan


def train_many(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A file with a shared recipe and a list of adapters, or a folder of recipes that "
            "share a base; with --resume, the folder of results.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the runs.", show_default="runs/NAME")
    ] = None,
    publish: Annotated[
        str | None,
        typer.Option(
            metavar="PREFIX", help="Publish those that name no name of their own as PREFIX/NAME."
        ),
    ] = None,
    together: Annotated[
        int | None,
        typer.Option(min=1, help="Most that train at one time.", show_default="what fits"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in a stopped folder, given as FILE.")
    ] = False,
    ignore_plan: IgnorePlan = False,
    as_json: AsJson = False,
) -> None:
    """Train many adapters over one base in one pass, each on its own data.

    Each finishes, is evaluated and published on its own. One that fails is reported and leaves the
    others untouched; the exit status is then 1. Stopped or killed, the same command goes on; what
    was added to the file since is trained too.
    """
    from tunefork.errors import BadInputError
    from tunefork.sweep.many import ENTRIES
    from tunefork.sweep.many import train_many as run
    from tunefork.sweep.many_file import load_entries, load_many
    from tunefork.sweep.many_result import RESULT
    from tunefork.sweep.many_table import print_many

    if resume and (out is not None or publish is not None):
        raise BadInputError("--resume: goes on with what was begun; give the folder alone")
    folder = file if resume else out or Path("runs") / file.stem
    entries = load_entries(file / ENTRIES) if resume else load_many(file, publish)
    result = run(
        entries,
        folder,
        together=together,
        ignore_plan=ignore_plan,
        say=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        typer.echo((folder / RESULT).read_text(encoding="utf-8"))
    else:
        print_many(result, folder)
    if result.has_failed:
        raise typer.Exit(1)
