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
from tunefork.installed import OWN_VERSION

app = typer.Typer(
    name="tunefork",
    help="LoRA, QLoRA or full fine-tuning? Train all three on your data, compare them fairly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS = {
    "Before a run": (advise, plan),
    "Runs": (compare, train, sweep, train_many, evaluate, runs, verify_resume),
    "What came out": (chat, merge, export, bench_serve),
}
for panel, verbs in VERBS.items():
    for verb in verbs:
        app.command(rich_help_panel=panel)(verb)
app.add_typer(data, name="data", rich_help_panel="Before a run")
app.add_typer(recipe, name="recipe", rich_help_panel="Before a run")
app.add_typer(adapters, name="adapters", rich_help_panel="What came out")
app.add_typer(serve, name="serve", rich_help_panel="What came out")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tunefork {OWN_VERSION}")
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
