"""From a request's fields to an order; what the engine cannot honour is refused before."""

import json
import time
import uuid
from collections.abc import Sequence

from tunefork.page.units import counted
from tunefork.serve.answers import Answer
from tunefork.serve.api.chat_request import (
    JsonObjectFormat,
    JsonSchemaFormat,
    PlainFormat,
    ResponseFormat,
)
from tunefork.serve.api.errors import ApiError, bad, unsupported
from tunefork.serve.api.sampling_fields import SamplingFields
from tunefork.serve.door import Caller
from tunefork.serve.engine import Capabilities, Grammar, Sampling
from tunefork.serve.gateway import Gateway, Target
from tunefork.serve.order import Order

_BY_ENGINE = "the engine of this server cannot"


def check_stream(body: SamplingFields) -> None:
    """`stream_options` has a meaning only with `stream`."""
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options: is only for stream: true", "stream_options")


def to_grammar(wanted: ResponseFormat | None, capabilities: Capabilities) -> Grammar | None:
    """What the answer must match. Raises ApiError where the engine cannot see to it."""
    match wanted:
        case None | PlainFormat():
            return None
        case JsonObjectFormat():
            grammar = Grammar("json_object")
        case JsonSchemaFormat():
            schema = json.dumps(wanted.json_schema.schema_)
            grammar = Grammar("json_schema", schema)
    if grammar.kind not in capabilities.grammars:
        raise unsupported(
            "response_format",
            f"{_BY_ENGINE} constrain answers to {grammar.kind} (to the embedded one, its operator "
            "can add grammars: pip install 'tunefork[grammar]')",
        )
    return grammar


def to_sampling(
    body: SamplingFields,
    gateway: Gateway,
    target: Target,
    *,
    stop_ids: Sequence[int],
    max_tokens: int,
    logprobs: int | None,
    grammar: Grammar | None = None,
) -> Sampling:
    """How tokens are chosen. Raises ApiError for what the engine does not honour."""
    capabilities = target.engine.capabilities
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    if bias and max(bias) >= gateway.base.vocab_size:
        raise bad(f"logit_bias: token ids must be below {gateway.base.vocab_size}", "logit_bias")
    if logprobs is not None and logprobs > capabilities.max_logprobs:
        most = capabilities.max_logprobs
        raise bad(f"The engine tells at most {most} likeliest tokens", "top_logprobs")
    is_greedy = body.temperature == 0 or body.top_p == 0
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=0.0 if is_greedy else 1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        top_k=body.top_k or 0,
        seed=None if body.seed is None else body.seed % 2**63,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
        stop=body.stops,
        stop_ids=() if body.ignore_eos else tuple(stop_ids),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        grammar=grammar,
    )
    plain = Sampling(max_tokens=1)
    for name in _REFUSABLE:
        is_used = getattr(sampling, name) != getattr(plain, name)
        if is_used and name not in capabilities.sampling:
            raise unsupported(name, f"{_BY_ENGINE} honour it")
    return sampling


_REFUSABLE = (
    *("top_p", "top_k", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "stop"),
    *("ignore_eos", "logprobs"),
)


def answer_tokens(
    gateway: Gateway,
    caller: Caller,
    target: Target,
    lengths: Sequence[int],
    *,
    choices: int,
    asked: int | None,
    default: int | None,
    param: str,
) -> int:
    """Most tokens of an answer to prompts of `lengths`. Raises ApiError where there is no room.

    `default` is of the API; None: what the context has left. What nobody asked for shrinks to the
    month's quota.
    """
    longest, most = max(lengths), target.engine.capabilities.max_model_len
    if longest + (asked or 1) > most:
        wanted = f" and {asked:,} of the answer" if asked else ""
        raise too_long(most, f"{counted(longest, 'token')}{wanted} were asked for", param)
    if asked is not None:
        return asked
    room = most - longest if default is None else min(default, most - longest)
    left = gateway.parts.quotas.left_this_month(caller.tenant)
    if left is not None:
        room = max(1, min(room, (left - sum(lengths)) // (len(lengths) * choices)))
    return room


def too_long(most: int, found: str, param: str) -> ApiError:
    """The error by which clients know that a conversation must be cut."""
    return bad(
        f"This model's context has {most:,} tokens, and {found}; shorten the prompt or ask for "
        "fewer",
        param,
        "context_length_exceeded",
    )


def check_size(gateway: Gateway, target: Target, characters: int, param: str) -> None:
    """Refuse before it is tokenised what has too many tokens in any case."""
    most = target.engine.capabilities.max_model_len
    at_least = characters // gateway.base.longest_token
    if at_least >= most:
        raise too_long(most, f"at least {at_least:,} tokens were asked for", param)


def begin(
    gateway: Gateway,
    caller: Caller,
    target: Target,
    *,
    prefix: str,
    prompts: Sequence[Sequence[int]],
    choices: int,
    sampling: Sampling,
    end_user: str | None,
) -> Answer:
    """Queue it. Raises ApiError (429)."""
    try:
        gateway.parts.quotas.admit_tokens(caller.tenant)
    except ApiError:
        gateway.parts.metrics.refused(caller.tenant.name, "tokens")
        raise
    order = Order(
        id=f"{prefix}-{uuid.uuid4().hex}",
        endpoint="chat.completions" if prefix == "chatcmpl" else "completions",
        tenant=caller.tenant,
        key_id=caller.key_id,
        model=target.name,
        engine=target.engine,
        adapter=target.adapter,
        prompts=tuple(map(tuple, prompts)),
        choices=choices,
        sampling=sampling,
        deadline=time.monotonic() + gateway.settings.request_timeout_s,
        end_user=end_user,
        lease=target.lease,
    )
    try:
        return Answer(gateway.parts, order)
    except ApiError as error:
        if error.code == "insufficient_quota":
            gateway.parts.metrics.refused(caller.tenant.name, "month")
        raise
