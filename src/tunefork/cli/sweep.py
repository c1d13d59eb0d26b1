"""`tunefork sweep`: variants of one recipe, trained together, and which rank to take."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tunefork.cli.arguments import AsJson, IgnorePlan, Sets, load_recipe


def _knob(help: str, *names: str) -> Any:
    return typer.Option(*names, metavar="LIST", help=help, rich_help_panel="What is varied")


def sweep(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A recipe file; with --resume, the folder.")
    ],
    rank: Annotated[str | None, _knob("lora.rank: --rank 8,16,32")] = None,
    lr: Annotated[str | None, _knob("train.learning_rate: --lr 1e-4,3e-4")] = None,
    alpha: Annotated[str | None, _knob("lora.alpha")] = None,
    scaling: Annotated[str | None, _knob("lora.scaling: standard,rslora")] = None,
    targets: Annotated[
        str | None, _knob("lora.targets: all-linear,attention,q_proj+v_proj")
    ] = None,
    dropout: Annotated[str | None, _knob("lora.dropout")] = None,
    seed: Annotated[str | None, _knob("train.seed: --seed 0,1,2")] = None,
    schedule: Annotated[str | None, _knob("train.schedule: cosine,constant")] = None,
    warmup_share: Annotated[str | None, _knob("train.warmup_share")] = None,
    weight_decay: Annotated[str | None, _knob("train.weight_decay")] = None,
    batch_size: Annotated[str | None, _knob("train.batch_size")] = None,
    epochs: Annotated[str | None, _knob("train.epochs")] = None,
    max_steps: Annotated[str | None, _knob("train.max_steps")] = None,
    data: Annotated[str | None, _knob("data.train: a.jsonl,b.jsonl")] = None,
    random: Annotated[
        int | None,
        typer.Option(metavar="COUNT", help="Draw so many combinations (each with every seed)."),
    ] = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="Drop the worse half at a quarter and a half.")
    ] = False,
    together: Annotated[
        int | None, typer.Option(help="Most that train at one time.", show_default="what fits")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="runs/NAME-sweep")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in a stopped sweep's folder, given as RECIPE.")
    ] = False,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown too.")
    ] = None,
    sets: Sets = None,
    ignore_plan: IgnorePlan = False,
    as_json: AsJson = False,
) -> None:
    """Train many variants in one pass over one base; rank them, say which rank to take.

    What is not given here comes from the recipe's `sweep:` section. Ends with a table; the folder's
    report.html and sweep.json hold the rest, and each variant is a run of its own below variants/.
    Stopped or killed, the same command (or --resume FOLDER) goes on.
    """
    given = {
        "rank": rank,
        "learning_rate": lr,
        "alpha": alpha,
        "scaling": scaling,
        "targets": targets,
        "dropout": dropout,
        "seed": seed,
        "schedule": schedule,
        "warmup_share": warmup_share,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "epochs": epochs,
        "max_steps": max_steps,
        "data": data,
    }
    lists = [_override(name, text) for name, text in given.items() if text is not None]
    if random is not None:
        lists += ["sweep.search=random", f"sweep.count={random}"]
    if halving:
        lists.append("sweep.halving={}")
    if together is not None:
        lists.append(f"sweep.together={together}")
    folder, file = out or Path("runs") / f"{recipe.stem}-sweep", recipe
    if resume:
        folder, file = _resumed(recipe, lists, sets, out)
    resolved = load_recipe(file, [*(sets or []), *lists])
    from tunefork.sweep.markdown import sweep_markdown
    from tunefork.sweep.result import RESULT
    from tunefork.sweep.sweep import REPORT
    from tunefork.sweep.sweep import sweep as run
    from tunefork.sweep.table import print_sweep

    result = run(
        resolved, folder, say=lambda line: typer.echo(line, err=True), ignore_plan=ignore_plan
    )
    if markdown is not None:
        write_text(markdown, sweep_markdown(result, command_line()))
    if as_json:
        typer.echo((folder / RESULT).read_text(encoding="utf-8"))
    else:
        print_sweep(result, folder / REPORT)
    if all(variant.status != "ok" for variant in result.variants):
        raise typer.Exit(1)


def _override(name: str, text: str) -> str:
    """`sweep.rank=[8,16]` of `8,16`; what is joined by + is a list of its own."""
    values = [value.strip() for value in text.split(",")]
    if name == "targets":
        values = [f"[{value.replace('+', ',')}]" if "+" in value else value for value in values]
    return f"sweep.{name}=[{','.join(values)}]"


def _resumed(
    folder: Path, lists: list[str], sets: list[str] | None, out: Path | None
) -> tuple[Path, Path]:
    """The stopped sweep's folder and its recipe, which nothing may change."""
    from tunefork.errors import BadInputError, RunFolderError
    from tunefork.registry.run import RECIPE

    if lists or sets or out is not None:
        raise BadInputError("--resume: goes on with what was begun; give the folder alone")
    if not (folder / RECIPE).is_file():
        raise RunFolderError(f"{folder}: holds no sweep to go on with; give the sweep's folder")
    return folder, folder / RECIPE


def write_text(file: Path, text: str) -> None:
    """Write `file`; raises TuneforkError where it cannot be."""
    from tunefork.page.html import write_page

    file.parent.mkdir(parents=True, exist_ok=True)
    write_page(text, file)


def command_line() -> str:
    """What was typed, for a document's head."""
    import shlex
    import sys

    return shlex.join(["tunefork", *sys.argv[1:]])
