"""POST /v1/completions."""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from tunefork.serve.answers import Answer
from tunefork.serve.api import asking, stream
from tunefork.serve.api.chat import merged, usage
from tunefork.serve.api.completion_request import MOST_PROMPTS, CompletionRequest
from tunefork.serve.api.errors import bad
from tunefork.serve.api.gone import unless_gone
from tunefork.serve.api.reading import read_body
from tunefork.serve.api.tokens import completion_logprobs
from tunefork.serve.engine import Piece, TokenLogprob
from tunefork.serve.gateway import Caller, Gateway, Target

_MAX_TOKENS = 16
"""Of an answer by default, as in the API."""


async def create_completion(request: Request) -> ASGIApp:
    """Write on a text."""
    gateway: Gateway = request.app.state.gateway
    caller = gateway.admit(request.headers)
    body = await read_body(request, gateway, CompletionRequest)
    return await unless_gone(request, _answer(request, gateway, caller, body))


async def _answer(
    request: Request, gateway: Gateway, caller: Caller, body: CompletionRequest
) -> ASGIApp:
    _check(body)
    target = await gateway.target(body.model, caller.tenant)
    try:
        answer = await _begin(gateway, caller, target, body)
    except BaseException:
        target.release()
        raise
    request.scope["cleanup"].append(answer.abandon)
    told = _Told(gateway, answer, body)
    if not body.stream:
        return Response(stream.to_json(await told.whole()), media_type="application/json")
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    events = told.events(await answer.take(), include_usage=include_usage)
    return stream.EventStream(events, stall_timeout_s=gateway.settings.stall_timeout_s)


def _check(body: CompletionRequest) -> None:
    asking.check_stream(body)
    best_of, choices = body.best_of or body.n or 1, body.n or 1
    if best_of < choices:
        raise bad("best_of: must be at least n", "best_of")
    if best_of > choices and body.stream:
        raise bad("best_of: cannot be streamed unless it is n", "best_of")
    if len(body.prompts) * best_of > MOST_PROMPTS:
        raise bad(f"prompt: at most {MOST_PROMPTS} answers to all prompts together", "prompt")


async def _begin(
    gateway: Gateway, caller: Caller, target: Target, body: CompletionRequest
) -> Answer:
    prompts = [await _ids(gateway, target, prompt) for prompt in body.prompts]
    choices = body.best_of or body.n or 1
    max_tokens = asking.answer_tokens(
        gateway,
        caller,
        target,
        [len(ids) for ids in prompts],
        choices=choices,
        asked=body.max_tokens,
        default=_MAX_TOKENS,
        param="prompt",
    )
    has_to_rank = choices > (body.n or 1)
    sampling = asking.to_sampling(
        body,
        gateway,
        target,
        stop_ids=gateway.base.eos_ids,
        max_tokens=max_tokens,
        logprobs=0 if has_to_rank and body.logprobs is None else body.logprobs,
    )
    return asking.begin(
        gateway,
        caller,
        target,
        prefix="cmpl",
        prompts=prompts,
        choices=choices,
        sampling=sampling,
        end_user=body.user,
    )


async def _ids(gateway: Gateway, target: Target, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        asking.check_size(gateway, target, len(prompt), "prompt")
        ids: list[int] = await gateway.in_thread(target.prompts.text, prompt)
        if not ids:
            raise bad("prompt: has no tokens; this model needs at least one", "prompt")
        return ids
    if max(prompt) >= gateway.base.vocab_size:
        raise bad(f"prompt: token ids must be below {gateway.base.vocab_size}", "prompt")
    return prompt


class _Told:
    """The shapes in which an answer is told."""

    def __init__(self, gateway: Gateway, answer: Answer, body: CompletionRequest) -> None:
        self._answer, self._body = answer, body
        self._echoed = self._echoes(gateway) if body.echo else [""] * len(answer.order.prompts)
        self._head = {
            "id": answer.order.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": answer.order.model,
            "system_fingerprint": gateway.base.fingerprint,
        }

    def _echoes(self, gateway: Gateway) -> list[str]:
        decode = gateway.base.tokenizer.decode
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
        order = self._answer.order
        left = len(order.prompts) * order.choices
        begun: dict[int, int] = {}
        pieces = first
        while pieces is not None:
            for index, text, logprobs, reason in merged(pieces):
                left -= reason is not None
                if left == 0:
                    await self._answer.finish()
                is_first = index not in begun
                offset = begun.get(index, 0)
                choice = self._choice(
                    index, index, text, logprobs, reason, is_first=is_first, offset=offset
                )
                begun[index] = offset + len(choice["text"])
                yield stream.event(head | {"choices": [choice]})
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
        offset: int = 0,
    ) -> dict[str, Any]:
        echoed = self._echoed[index // self._answer.order.choices] if is_first else ""
        top = self._body.logprobs
        told = None if top is None else completion_logprobs(logprobs, top, offset + len(echoed))
        return {"index": place, "text": echoed + text, "logprobs": told, "finish_reason": reason}


def _mean(logprobs: tuple[TokenLogprob, ...]) -> float:
    return sum(entry.logprob for entry in logprobs) / max(1, len(logprobs))
