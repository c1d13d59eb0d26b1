"""POST /v1/chat/completions."""

from fastapi import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from tunefork.data.example import Message
from tunefork.errors import DataError
from tunefork.serve.answers import Answer
from tunefork.serve.api import asking, stream
from tunefork.serve.api.admission import admit
from tunefork.serve.api.chat_answer import ChatAnswer
from tunefork.serve.api.chat_request import ChatRequest
from tunefork.serve.api.errors import bad
from tunefork.serve.api.gone import unless_gone
from tunefork.serve.api.reading import read_body
from tunefork.serve.door import Caller
from tunefork.serve.gateway import Gateway, Target


async def create_chat_completion(request: Request) -> ASGIApp:
    """Answer a conversation."""
    gateway: Gateway = request.app.state.gateway
    caller = admit(request)
    body = await read_body(request, gateway, caller.tenant, ChatRequest)
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
    told = ChatAnswer(gateway, answer, body)
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
    characters = target.prompts.added_characters + sum(len(turn.content) for turn in turns)
    asking.check_size(gateway, target, characters, "messages")
    try:
        ids = await gateway.read(caller.tenant, target.prompts.chat, turns)
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
