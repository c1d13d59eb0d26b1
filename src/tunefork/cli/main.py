"""`tunefork`: the verbs, and how an error ends the program.

Nothing heavy is imported until a verb runs, so that --help answers at once. Exit status: 0 done,
1 a run failed, 2 bad input, 130 interrupted. Tracebacks are shown only with --debug.
"""

import sys
import traceback
from typing import Annotated

import typer

from tunefork.cli.chat import chat
from tunefork.cli.compare import compare
from tunefork.cli.data import data
from tunefork.cli.evaluate import evaluate
from tunefork.cli.recipe import recipe
from tunefork.cli.runs import runs
from tunefork.cli.train import train
from tunefork.errors import TuneforkError, is_disk_full

app = typer.Typer(
    name="tunefork",
    help="LoRA, QLoRA or full fine-tuning? Train all three on your data, compare them fairly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (compare, train, evaluate, chat, runs):
    app.command()(verb)
app.add_typer(data, name="data")
app.add_typer(recipe, name="recipe")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tunefork {version('tunefork')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options that come before the verb."""


def main() -> None:
    """Run the command line and exit."""
    try:
        app()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            typer.echo("stopped; what was finished is kept", err=True)
        raise
    except Exception as error:  # the last stop: whatever it is, say it and set the exit status
        if "--debug" in sys.argv[1:2]:
            traceback.print_exc()
        typer.echo(f"error: {_describe(error)}", err=True)
        sys.exit(error.exit_status if isinstance(error, TuneforkError) else 1)


_INTERRUPTED = 130
"""What typer makes of Ctrl-C, and `tunefork train` of a run that it stopped."""


def _describe(error: Exception) -> str:
    if isinstance(error, TuneforkError):
        return str(error)
    if is_disk_full(error):
        return f"the disk is full ({error}); free some space and run the same command again"
    return (
        f"{type(error).__name__}: {error}\n"
        "This is a fault of tunefork or of a library; `tunefork --debug ...` shows where."
    )
