"""`tunefork chat`: talk to a run or a model, through the template that it was trained with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from tunefork.cli.arguments import KeyVariable, check_server, read_key

if TYPE_CHECKING:
    from tunefork.serve.conversation import Conversation
    from tunefork.serve.remote import RemoteConversation

    Talk = Conversation | RemoteConversation


def chat(
    target: Annotated[
        str | None,
        typer.Argument(metavar="RUN_OR_MODEL", help="A run, adapter, version or model."),
    ] = None,
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
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask an OpenAI server instead; with --model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The server's name for the model.")
    ] = None,
    key_env: KeyVariable = None,
) -> None:
    """Chat with a run, an adapter, a model or a server. An empty line or Ctrl-D ends it."""
    with _open(target, server, model, key_env, system, max_new_tokens, temperature) as talk:
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


def _open(
    target: str | None,
    server: str | None,
    model: str | None,
    key_env: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
) -> AbstractContextManager[Talk]:
    from tunefork.errors import BadInputError

    if (server is None) == (target is None):
        raise BadInputError("chat: give RUN_OR_MODEL or --server, one of both")
    if (server is None) != (model is None):
        raise BadInputError("chat: --server and --model belong together")
    if server is not None and model is not None:
        from tunefork.serve.remote import RemoteConversation

        return RemoteConversation(
            check_server(server),
            model,
            read_key(key_env),
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
    if key_env is not None:
        raise BadInputError("chat: --key-env is for --server")
    return nullcontext(_open_here(str(target), system, max_new_tokens, temperature))


def _open_here(
    target: str, system: str | None, max_new_tokens: int, temperature: float
) -> Conversation:
    from tunefork.registry.opening import open_model
    from tunefork.serve.conversation import Conversation

    opened = open_model(target)
    return Conversation(
        opened.model,
        opened.tokenizer,
        opened.data,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


def _print_answer(talk: Talk, asked: str) -> None:
    for piece in talk.ask(asked):
        typer.echo(piece, nl=False)
    typer.echo()
