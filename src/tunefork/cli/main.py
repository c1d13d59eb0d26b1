"""`tunefork`: the verbs, and how an error ends the program.

Nothing heavy is imported until a verb runs, so that --help answers at once. Exit status: 0 done,
1 a run failed, 2 bad input, 130 interrupted. Tracebacks are shown only with --debug.
"""

import sys
from typing import Annotated

import typer

from tunefork.cli.chat import chat
from tunefork.cli.compare import compare
from tunefork.cli.data import data
from tunefork.cli.evaluate import evaluate
from tunefork.cli.recipe import recipe
from tunefork.cli.runs import runs
from tunefork.cli.train import train
from tunefork.errors import TuneforkError

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
    if "--debug" in sys.argv[1:2]:
        app()
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("stopped; what was finished is kept", err=True)
        sys.exit(130)
    except TuneforkError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        typer.echo(
            f"error: {type(error).__name__}: {error}\n"
            "This is a fault of tunefork or of a library; `tunefork --debug ...` shows where.",
            err=True,
        )
        sys.exit(1)
