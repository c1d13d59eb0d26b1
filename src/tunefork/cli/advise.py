"""`tunefork advise`: which method, where and how to start, from a description."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunefork.cli.arguments import AsJson
from tunefork.errors import BadInputError, nearest

if TYPE_CHECKING:
    from tunefork.advise.advice import Advice, Reason
    from tunefork.advise.resolve import Resolved

_TOPICS = ("rank", "serving", "full", "qlora", "duration", "managed")
_FACTS = "The situation"
_Text = str | None


def _fact(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_FACTS)


def advise(
    situation: Annotated[
        Path | None, typer.Option(help="A file that describes the situation (YAML or JSON).")
    ] = None,
    model: Annotated[_Text, _fact("Hub id, folder, recipe file, or a size (8B).")] = None,
    model_params: Annotated[_Text, _fact("Parameters of the model (8B, 8e9).")] = None,
    task: Annotated[_Text, _fact("classification, chat, style, code, ...")] = None,
    examples: Annotated[_Text, _fact("Training examples, of one customer (50000, 50k).")] = None,
    tokens: Annotated[_Text, _fact("Tokens of them all (12M).")] = None,
    tenants: Annotated[_Text, _fact("Customers with a behaviour of their own.")] = None,
    change: Annotated[_Text, _fact("style, skill, behaviour, domain_language or facts.")] = None,
    quality_point_value_usd: Annotated[
        _Text, _fact("Worth of one more percentage point of quality, US dollars.")
    ] = None,
    distribute: Annotated[
        bool | None, _fact("Whether the weights are handed to others.", "--distribute/--keep")
    ] = None,
    gpu: Annotated[
        list[str] | None, _fact("A GPU at hand (l40s); once for each.", "--gpu", "--gpus")
    ] = None,
    budget_usd: Annotated[_Text, _fact("What the training may cost, US dollars.")] = None,
    deadline_hours: Annotated[_Text, _fact("How long the training may take.")] = None,
    data_may_leave: Annotated[
        bool | None,
        _fact("Whether the data may leave the house.", "--data-may-leave/--data-stays"),
    ] = None,
    explain: Annotated[
        _Text, typer.Option(metavar="TOPIC", help=f"Answer one question: {', '.join(_TOPICS)}.")
    ] = None,
    recipe_out: Annotated[Path | None, typer.Option(help="Write the recipe to this file.")] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder with comparisons; the store's count too. Repeatable.", show_default="runs"
        ),
    ] = None,
    catalogue: Annotated[
        Path | None, typer.Option(help="GPUs and prices of your own (YAML).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which method suits a situation, why, how sure that is and what would change it.

    Every fact is optional; what is missing is named with its effect. With none at all, questions
    are asked on a terminal. Figures are predicted; your own comparisons outrank rules of thumb.
    """
    facts = {
        "model": model,
        "model_params": model_params,
        "task": task,
        "examples": examples,
        "tokens": tokens,
        "tenants": tenants,
        "change": change,
        "quality_point_value_usd": quality_point_value_usd,
        "distribute": distribute,
        "gpus": None if gpu is None else ",".join(gpu),
        "budget_usd": budget_usd,
        "deadline_hours": deadline_hours,
        "data_may_leave": data_may_leave,
    }
    given = {key: value for key, value in facts.items() if value is not None}
    if explain is not None and explain not in _TOPICS:
        allowed = list(_TOPICS)
        raise BadInputError(
            f"--explain: {explain!r} is no topic{nearest(explain, allowed)}; there are "
            f"{', '.join(allowed)}"
        )
    if situation is None and not given and explain is None:
        given = _ask()
    resolved = _resolve(situation, given, runs, catalogue)
    if explain is not None:
        _explain(resolved, explain, as_json)
        return
    from rich.console import Console

    from tunefork.advise.advise import advise as run

    with Console(stderr=True).status("planning on each machine of the catalogue"):
        advice = run(resolved)
    if recipe_out is not None:
        _write_recipe(advice, recipe_out)
    if as_json:
        typer.echo(advice.model_dump_json(indent=2))
        return
    from tunefork.cli.advice import print_advice

    print_advice(advice, recipe_out)


def _ask() -> dict[str, Any]:
    """The situation from a few questions; raises BadInputError where nobody can answer."""
    if not _is_terminal():
        raise BadInputError(
            "nothing is said about the situation and there is no terminal to ask on: give "
            "--situation FILE or flags, for example --model 8B --task classification "
            "--examples 50k; tunefork advise --help lists them"
        )
    from tunefork.advise.questions import ask_all

    def ask(text: str) -> str:
        return str(typer.prompt(text, default="", show_default=False, prompt_suffix=" "))

    try:
        return ask_all(ask, typer.echo)
    except typer.Abort:  # Ctrl-C, or the end of what is typed
        raise KeyboardInterrupt from None


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _resolve(
    file: Path | None, given: dict[str, Any], runs: list[Path] | None, catalogue: Path | None
) -> Resolved:
    from tunefork.advise.experience import places
    from tunefork.advise.resolve import resolve
    from tunefork.advise.situation import load_situation
    from tunefork.plan.catalogue import load_catalogue

    for folder in runs or ():
        if not folder.is_dir():
            raise BadInputError(f"--runs: {folder}: no such folder; give one that holds runs")
    situation = load_situation(file, given)
    return resolve(situation, load_catalogue(catalogue), places(runs or ()))


def _explain(resolved: Resolved, topic: str, as_json: bool) -> None:
    import json

    from tunefork.advise.explain import TOPICS, explain
    from tunefork.cli.advice import print_reasons

    said: list[Reason] = explain(resolved.facts, next(t for t in TOPICS if t == topic))
    if as_json:
        rows = [{"text": reason.text, "source": reason.source} for reason in said]
        answer = {"topic": topic, "answers": rows, "assumptions": resolved.assumptions}
        typer.echo(json.dumps(answer, indent=2))
    else:
        print_reasons(said, resolved.assumptions)


def _write_recipe(advice: Advice, file: Path) -> None:
    if advice.recipe_yaml is None:
        typer.echo(f"{file}: not written: {advice.text}", err=True)
        return
    if file.exists():
        raise BadInputError(f"--recipe-out: {file} exists; give a new file")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(advice.recipe_yaml, encoding="utf-8")
