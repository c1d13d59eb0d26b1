"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from tunefork.data.example import Message
from tunefork.errors import DataError
from tunefork.serve.answers import Answer
from tunefork.serve.api import asking, stream
from tunefork.serve.api.chat_request import ChatRequest
from tunefork.serve.api.errors import bad
from tunefork.serve.api.gone import unless_gone
from tunefork.serve.api.reading import read_body
from tunefork.serve.api.tokens import chat_tokens
from tunefork.serve.engine import Piece
from tunefork.serve.gateway import Caller, Gateway, Target


async def create_chat_completion(request: Request) -> ASGIApp:
    """Answer a conversation."""
    gateway: Gateway = request.app.state.gateway
    caller = gateway.admit(request.headers)
    body = await read_body(request, gateway, ChatRequest)
    return await unless_gone(request, _answer(request, gateway, caller, body))


async def _answer(request: Request, gateway: Gateway, caller: Caller, body: ChatRequest) -> ASGIApp:
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
    first = await answer.take()
    events = told.events(first, include_usage=_includes_usage(body))
    return stream.EventStream(events, stall_timeout_s=gateway.settings.stall_timeout_s)


def _check(body: ChatRequest) -> None:
    asking.check_stream(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs: is only for logprobs: true", "top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise bad("max_tokens: give this or max_completion_tokens", "max_tokens")
    if None not in (body.user, body.safety_identifier):
        raise bad("user: give this or safety_identifier", "user")


async def _begin(gateway: Gateway, caller: Caller, target: Target, body: ChatRequest) -> Answer:
    grammar = asking.to_grammar(body.response_format, target.engine.capabilities)
    turns = [Message(_role(turn.role), turn.text) for turn in body.messages]
    asking.check_size(gateway, target, sum(len(t.content) for t in turns), "messages")
    try:
        ids = await gateway.in_thread(target.prompts.chat, turns)
    except DataError as error:
        raise bad(str(error), "messages") from error
    choices = body.n or 1
    max_tokens = asking.answer_tokens(
        gateway,
        caller,
        target,
        [len(ids)],
        choices=choices,
        asked=body.max_completion_tokens or body.max_tokens,
        default=None,
        param="messages",
    )
    sampling = asking.to_sampling(
        body,
        gateway,
        target,
        stop_ids=target.prompts.stop_ids,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=grammar,
    )
    return asking.begin(
        gateway,
        caller,
        target,
        prefix="chatcmpl",
        prompts=[ids],
        choices=choices,
        sampling=sampling,
        end_user=body.safety_identifier or body.user,
    )


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _includes_usage(body: ChatRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


class _Told:
    """The shapes in which an answer is told."""

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
        begun: set[int] = set()
        ended = 0
        pieces = first
        while pieces is not None:
            for index, text, logprobs, reason in merged(pieces):
                told = self._logprobs(chat_tokens(self._tokenizer, logprobs))
                if index not in begun:
                    begun.add(index)
                    yield _chunk(head, index, {"role": "assistant", "content": ""}, None, None)
                if text or logprobs:
                    yield _chunk(head, index, {"content": text}, told, None)
                if reason is not None:
                    ended += 1
                    if ended == self._answer.order.choices:
                        await self._answer.finish()
                    yield _chunk(head, index, {}, None, reason)
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
    head: dict[str, Any],
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None,
    reason: str | None,
) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return stream.event(head | {"choices": [choice]})
