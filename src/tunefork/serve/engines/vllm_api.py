"""vLLM's HTTP API: what a request becomes, and what comes back.

Prompts are token ids and go to /v1/completions, so that vLLM renders nothing. Every field that a
default of the model could fill is sent. Read from vllm/entrypoints/openai/completion/protocol.py
of 0.32; `cache_salt`, `structured_outputs` and `return_token_ids` are in 0.25 as well.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from tunefork.errors import BadInputError, EngineDeadError, EngineError, TuneforkError
from tunefork.serve.engine import (
    EngineRequest,
    FinishReason,
    Grammar,
    Piece,
    Sampling,
    TokenLogprob,
)

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cancelled"}
_SAID = 600
"""Characters of vLLM's own message that are passed on."""


def body(request: EngineRequest, model: str, salt: str) -> bytes:
    """The JSON that asks for `request` of the model or adapter called `model`."""
    sampling = request.sampling
    fields: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt_ids),
        "request_id": request.id,
        "stream": True,
        "return_token_ids": True,
        "cache_salt": salt,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "seed": sampling.seed,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": 1.0,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": sampling.ignore_eos,
        "add_special_tokens": False,
    }
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.logprobs is not None:
        fields |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if sampling.grammar is not None:
        fields["structured_outputs"] = _grammar(sampling.grammar)
    return json.dumps(fields).encode()


def _grammar(grammar: Grammar) -> dict[str, Any]:
    match grammar.kind:
        case "json_object":
            return {"json_object": True}
        case "json_schema":
            return {"json": grammar.value}
        case "regex":
            return {"regex": grammar.value}


def piece(event: bytes, sampling: Sampling, text_of: Callable[[int], str]) -> Piece | None:
    """What one event of the stream says; None where it says nothing.

    `text_of` gives the text of one token. Raises what an event that is an error stands for.
    """
    fields = json.loads(event)
    if "error" in fields:
        code = fields["error"].get("code") if isinstance(fields["error"], dict) else None
        raise refusal(code if isinstance(code, int) else 500, event)
    if not fields["choices"]:
        return None
    choice = fields["choices"][0]
    ids = tuple(choice.get("token_ids") or ())
    reason = choice.get("finish_reason")
    ends_with = 1 if reason == "stop" and ids and ids[-1] in sampling.stop_ids else 0
    logprobs: tuple[TokenLogprob, ...] = ()
    if sampling.logprobs is not None and choice.get("logprobs"):
        told = _logprobs(choice["logprobs"], sampling.logprobs, text_of)
        logprobs = told[: len(told) - ends_with]  # what ended the answer is no part of it
    if reason is not None and reason not in _FINISH:
        raise EngineError(f"vLLM ended the answer: {reason}")
    return Piece(choice["text"], ids, logprobs, _FINISH[reason] if reason else None)


def _logprobs(
    told: Mapping[str, Any], count: int, text_of: Callable[[int], str]
) -> tuple[TokenLogprob, ...]:
    """vLLM gives the chosen token beside the `count` likeliest, keyed `token_id:N`."""
    found = []
    for token, logprob, likeliest in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        chosen = _token_id(token)
        ordered = sorted((likeliest or {}).items(), key=lambda one: -one[1])[:count]
        top = tuple((_token_id(name), text_of(_token_id(name)), value) for name, value in ordered)
        found.append(TokenLogprob(chosen, text_of(chosen), logprob, top))
    return tuple(found)


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def refusal(status: int, answer: bytes) -> TuneforkError:
    """What to raise for an answer that is no stream."""
    try:
        said = _message(json.loads(answer))
    except ValueError:
        said = "no reason given"
    if status == 401:
        return EngineDeadError("vLLM does not take the key; set vllm.key_env to one that it knows")
    if status < 500:
        return BadInputError(f"vLLM refuses the request: {said}")
    return EngineError(f"vLLM failed: {said}")


def _message(fields: Any) -> str:
    error = fields.get("error", fields) if isinstance(fields, dict) else fields
    said = error.get("message", "") if isinstance(error, dict) else str(error)
    return str(said).strip()[:_SAID] or "no reason given"


def gauges(metrics: str) -> dict[str, float]:
    """Those of vLLM's metrics that are looked at, summed over its engines."""
    wanted = ("vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    found = dict.fromkeys(wanted, 0.0)
    found["cache_tokens"] = 0.0
    for line in metrics.splitlines():
        name, _, rest = line.partition("{")
        labels, _, value = rest.rpartition("} ")
        if name in found:
            found[name] += float(value)
        elif name == "vllm:cache_config_info":
            size = labels.partition('kv_cache_size_tokens="')[2].partition('"')[0]
            found["cache_tokens"] += float(size) if size.isdigit() else 0.0
    return found
