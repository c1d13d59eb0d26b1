"""`tunefork chat`: talk to a run or a model, through the template that it was trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunefork.cli.evaluate import Target

if TYPE_CHECKING:
    from tunefork.serve.conversation import Conversation


def chat(
    target: Target,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Ask this once and exit.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system turn; by default the one it was trained with.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = 0.0,
) -> None:
    """Chat with a run, an adapter or a model. An empty line or Ctrl-D ends it."""
    from tunefork.registry.opening import open_model
    from tunefork.serve.conversation import Conversation

    opened = open_model(target)
    talk = Conversation(
        opened.model,
        opened.tokenizer,
        opened.data,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    if message is not None:
        _print_answer(talk, message)
        return
    while True:
        try:
            asked = input("> ")
        except EOFError:
            return
        if not asked.strip():
            return
        _print_answer(talk, asked)


def _print_answer(talk: Conversation, asked: str) -> None:
    for piece in talk.ask(asked):
        typer.echo(piece, nl=False)
    typer.echo()
