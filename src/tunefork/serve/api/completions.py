"""POST /v1/completions."""

from fastapi import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from tunefork.serve.answers import Answer
from tunefork.serve.api import asking, stream
from tunefork.serve.api.admission import admit
from tunefork.serve.api.completion_answer import CompletionAnswer
from tunefork.serve.api.completion_request import MOST_PROMPTS, CompletionRequest
from tunefork.serve.api.errors import bad
from tunefork.serve.api.gone import unless_gone
from tunefork.serve.api.reading import read_body
from tunefork.serve.door import Caller
from tunefork.serve.gateway import Gateway, Target

_MAX_TOKENS = 16
"""Of an answer by default, as in the API."""


async def create_completion(request: Request) -> ASGIApp:
    """Write on a text."""
    gateway: Gateway = request.app.state.gateway
    caller = admit(request)
    body = await read_body(request, gateway, caller.tenant, CompletionRequest)
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
    told = CompletionAnswer(gateway, answer, body)
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
    if body.echo and body.logprobs is not None:  # whose lists would begin with the prompt's tokens
        raise bad("logprobs: are told of the answer only, so not with echo", "logprobs")
    if len(body.prompts) * best_of > MOST_PROMPTS:
        raise bad(f"prompt: at most {MOST_PROMPTS} answers to all prompts together", "prompt")


async def _begin(
    gateway: Gateway, caller: Caller, target: Target, body: CompletionRequest
) -> Answer:
    prompts = [await _ids(gateway, caller, target, prompt) for prompt in body.prompts]
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


async def _ids(
    gateway: Gateway, caller: Caller, target: Target, prompt: str | list[int]
) -> list[int]:
    if isinstance(prompt, str):
        asking.check_size(gateway, target, len(prompt), "prompt")
        ids: list[int] = await gateway.read(caller.tenant, target.prompts.text, prompt)
        if not ids:
            raise bad("prompt: has no tokens; this model needs at least one", "prompt")
        return ids
    if max(prompt) >= gateway.base.vocab_size:
        raise bad(f"prompt: token ids must be below {gateway.base.vocab_size}", "prompt")
    return prompt
