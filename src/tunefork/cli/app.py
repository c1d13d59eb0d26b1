"""The verbs, put together. Nothing heavy is imported until one runs: --help answers at once."""

from typing import Annotated

import typer

from tunefork.cli.adapters import adapters
from tunefork.cli.advise import advise
from tunefork.cli.bench_serve import bench_serve
from tunefork.cli.chat import chat
from tunefork.cli.compare import compare
from tunefork.cli.data import data
from tunefork.cli.evaluate import evaluate
from tunefork.cli.export import export
from tunefork.cli.merge import merge
from tunefork.cli.plan import plan
from tunefork.cli.recipe import recipe
from tunefork.cli.runs import runs
from tunefork.cli.serve import serve
from tunefork.cli.sweep import sweep
from tunefork.cli.train import train
from tunefork.cli.train_many import train_many
from tunefork.cli.verify_resume import verify_resume

app = typer.Typer(
    name="tunefork",
    help="LoRA, QLoRA or full fine-tuning? Train all three on your data, compare them fairly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (advise, plan, compare, sweep, train, evaluate, chat, runs, merge, export):
    app.command()(verb)
app.add_typer(adapters, name="adapters")
app.add_typer(serve, name="serve")
app.command(name="train-many")(train_many)
app.command(name="verify-resume")(verify_resume)
app.command(name="bench-serve")(bench_serve)
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
