"""What a completion looks like: whole, and as the chunks of a stream."""

import time
from collections.abc import AsyncIterator
from typing import Any

from tunefork.serve.answers import Answer
from tunefork.serve.api import stream
from tunefork.serve.api.chat_answer import merged, usage
from tunefork.serve.api.completion_request import CompletionRequest
from tunefork.serve.api.tokens import Offsets, completion_logprobs
from tunefork.serve.engine import Piece, TokenLogprob
from tunefork.serve.gateway import Gateway


class CompletionAnswer:
    """One answer, whole or in pieces."""

    def __init__(self, gateway: Gateway, answer: Answer, body: CompletionRequest) -> None:
        self._answer, self._body, self._tokenizer = answer, body, gateway.base.tokenizer
        self._offsets: dict[int, Offsets] = {}
        self._echoed = self._echoes() if body.echo else [""] * len(answer.order.prompts)
        self._head = {
            "id": answer.order.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": answer.order.model,
            "system_fingerprint": gateway.base.fingerprint,
        }

    def _echoes(self) -> list[str]:
        decode = self._tokenizer.decode
        return [p if isinstance(p, str) else str(decode(p)) for p in self._body.prompts]

    async def whole(self) -> dict[str, Any]:
        """All choices, when they are complete; of `best_of` the likeliest by token."""
        order = self._answer.order
        count = len(order.prompts) * order.choices
        texts, reasons = [""] * count, ["stop"] * count
        logprobs: list[tuple[TokenLogprob, ...]] = [()] * count
        while (pieces := await self._answer.take()) is not None:
            for index, piece in pieces:
                texts[index] += piece.text
                logprobs[index] += piece.logprobs
                reasons[index] = piece.finish_reason or reasons[index]
        await self._answer.finish()
        chosen: list[int] = []
        for begin in range(0, count, order.choices):
            ranked = list(range(begin, begin + order.choices))
            if order.choices > (self._body.n or 1):
                ranked.sort(key=lambda index: -_mean(logprobs[index]))
            chosen += ranked[: self._body.n or 1]
        choices = [
            self._choice(place, index, texts[index], logprobs[index], reasons[index], is_first=True)
            for place, index in enumerate(chosen)
        ]
        return self._head | {"choices": choices, "usage": usage(self._answer)}

    async def events(
        self, first: list[tuple[int, Piece]] | None, *, include_usage: bool
    ) -> AsyncIterator[bytes]:
        """Chunks as they come."""
        head: dict[str, Any] = self._head | ({"usage": None} if include_usage else {})
        chunk_head = stream.chunk_head(head)
        order = self._answer.order
        left = len(order.prompts) * order.choices
        begun: set[int] = set()
        pieces = first
        while pieces is not None:
            for index, text, logprobs, reason in merged(pieces):
                left -= reason is not None
                if left == 0:
                    await self._answer.finish()
                is_first = index not in begun
                begun.add(index)
                choice = self._choice(index, index, text, logprobs, reason, is_first=is_first)
                yield stream.chunk(chunk_head, choice)
            pieces = await self._answer.take()
        if include_usage:
            yield stream.event(head | {"choices": [], "usage": usage(self._answer)})
        yield stream.DONE

    def _choice(
        self,
        place: int,
        index: int,
        text: str,
        logprobs: tuple[TokenLogprob, ...],
        reason: str | None,
        *,
        is_first: bool,
    ) -> dict[str, Any]:
        echoed = self._echoed[index // self._answer.order.choices] if is_first else ""
        told = None
        if (top := self._body.logprobs) is not None:
            if index not in self._offsets:
                self._offsets[index] = Offsets(self._tokenizer)
            told = completion_logprobs(self._tokenizer, logprobs, top, self._offsets[index])
        return {"index": place, "text": echoed + text, "logprobs": told, "finish_reason": reason}


def _mean(logprobs: tuple[TokenLogprob, ...]) -> float:
    return sum(entry.logprob for entry in logprobs) / max(1, len(logprobs))
