"""What a chat completion looks like: whole, and as the chunks of a stream."""

import time
from collections.abc import AsyncIterator
from typing import Any

from tunefork.serve.answers import Answer
from tunefork.serve.api import stream
from tunefork.serve.api.chat_request import ChatRequest
from tunefork.serve.api.tokens import chat_tokens
from tunefork.serve.engine import Piece
from tunefork.serve.gateway import Gateway


class ChatAnswer:
    """One answer, whole or in pieces."""

    def __init__(self, gateway: Gateway, answer: Answer, body: ChatRequest) -> None:
        self._answer, self._tokenizer = answer, gateway.base.tokenizer
        self._has_logprobs = bool(body.logprobs)
        self._head = {
            "id": answer.order.id,
            "created": int(time.time()),
            "model": answer.order.model,
            "system_fingerprint": gateway.base.fingerprint,
            "service_tier": "default",
        }

    async def whole(self) -> dict[str, Any]:
        """All choices, when they are complete."""
        count = self._answer.order.choices
        texts, reasons = [""] * count, ["stop"] * count
        logprobs: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        while (pieces := await self._answer.take()) is not None:
            for index, piece in pieces:
                texts[index] += piece.text
                if self._has_logprobs:
                    logprobs[index] += chat_tokens(self._tokenizer, piece.logprobs)
                reasons[index] = piece.finish_reason or reasons[index]
        await self._answer.finish()
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": texts[index], "refusal": None},
                "logprobs": self._logprobs(logprobs[index]),
                "finish_reason": reasons[index],
            }
            for index in range(count)
        ]
        return self._head | {
            "object": "chat.completion",
            "choices": choices,
            "usage": usage(self._answer),
        }

    async def events(
        self, first: list[tuple[int, Piece]] | None, *, include_usage: bool
    ) -> AsyncIterator[bytes]:
        """Chunks as they come; a choice's first has its role, its last its reason."""
        head = self._head | {"object": "chat.completion.chunk"}
        if include_usage:
            head["usage"] = None
        chunk_head = stream.chunk_head(head)
        begun: set[int] = set()
        ended = 0
        pieces = first
        while pieces is not None:
            for index, text, logprobs, reason in merged(pieces):
                told = self._logprobs(chat_tokens(self._tokenizer, logprobs))
                if index not in begun:
                    begun.add(index)
                    yield _chunk(
                        chunk_head, index, {"role": "assistant", "content": ""}, None, None
                    )
                if text or logprobs:
                    yield _chunk(chunk_head, index, {"content": text}, told, None)
                if reason is not None:
                    ended += 1
                    if ended == self._answer.order.choices:
                        await self._answer.finish()
                    yield _chunk(chunk_head, index, {}, None, reason)
            pieces = await self._answer.take()
        if include_usage:
            yield stream.event(head | {"choices": [], "usage": usage(self._answer)})
        yield stream.DONE

    def _logprobs(self, tokens: list[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": tokens, "refusal": None} if self._has_logprobs else None


def merged(
    pieces: list[tuple[int, Piece]],
) -> list[tuple[int, str, tuple[Any, ...], str | None]]:
    """Index, text, logprobs and finish reason: pieces that came together are sent together."""
    found: dict[int, tuple[int, str, tuple[Any, ...], str | None]] = {}
    for index, piece in pieces:
        _, text, logprobs, _ = found.get(index, (index, "", (), None))
        found[index] = (
            index,
            text + piece.text,
            logprobs + piece.logprobs,
            piece.finish_reason,
        )
    return list(found.values())


def usage(answer: Answer) -> dict[str, int]:
    """Tokens of an answer, as the API tells them."""
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _chunk(
    head: bytes,
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None,
    reason: str | None,
) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return stream.chunk(head, choice)
