"""A conversation with a model behind an OpenAI server, streamed; any such server."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from tunefork.errors import BadInputError, TuneforkError
from tunefork.serve.event_stream import Address, Answer, StreamBrokenError, post

_SAID = 400
"""Characters of a server's own message that are shown."""


class RemoteConversation:
    """Turns so far, and the server that answers them; close it, or use it in a `with`."""

    def __init__(
        self,
        server: str,
        model: str,
        key: str | None = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self.model, self.max_new_tokens, self.temperature = model, max_new_tokens, temperature
        self.messages: list[dict[str, str]] = []
        if system:
            self.messages.append({"role": "system", "content": system})
        self._address = Address.parse(server.rstrip("/").removesuffix("/v1"))
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._runner = asyncio.Runner()

    def __enter__(self) -> "RemoteConversation":
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.close()

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer in pieces; both turns are added once it is complete.

        Raises TuneforkError where the server gives none.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        pieces, answer = self._pieces(turns), ""
        while (piece := self._runner.run(_next(pieces))) is not None:
            answer += piece
            yield piece
        self.messages = [*turns, {"role": "assistant", "content": answer}]

    async def _pieces(self, turns: list[dict[str, str]]) -> AsyncIterator[str]:
        fields = {
            "model": self.model,
            "messages": turns,
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "stream": True,
        }
        body, is_whole = json.dumps(fields).encode(), False
        try:
            async with post(self._address, "/v1/chat/completions", body, self._headers) as answer:
                if answer.status != 200:
                    raise await _refusal(answer)
                async for event in answer.events():
                    is_whole = is_whole or event == b"[DONE]"
                    if not is_whole:
                        yield _text(json.loads(event))
        except StreamBrokenError as error:
            raise TuneforkError(f"--server: {error}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise TuneforkError(f"--server: {self._address} answers in another format") from error
        if not is_whole:
            raise TuneforkError(f"--server: {self._address} broke off its answer")


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


def _text(event: Any) -> str:
    if "error" in event:
        raise TuneforkError(f"--server: {_message(event)}")
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


async def _refusal(answer: Answer) -> TuneforkError:
    said = await reason(answer)
    if answer.status == 401:
        said += " (--key-env NAME: of the environment variable that holds one)"
    kind = BadInputError if answer.status < 500 else TuneforkError
    return kind(f"--server: HTTP {answer.status}: {said}")


async def reason(answer: Answer) -> str:
    """Why a server refuses, in its own words."""
    try:
        return _message(json.loads(await answer.body()))
    except ValueError:
        return "no reason given"


def _message(fields: Any) -> str:
    error = fields.get("error", "") if isinstance(fields, dict) else fields
    said = error.get("message", "") if isinstance(error, dict) else str(error)
    text = "".join(c if c.isprintable() else " " for c in str(said))  # of a terminal's commands
    return text.strip()[:_SAID] or "no reason given"
