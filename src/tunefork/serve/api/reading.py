"""A request's body: JSON of a bounded size and depth, as its model allows it."""

import re
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from tunefork.serve.api.chat_request import (
    ChatMessage,
    ChatRequest,
    JsonSchemaFormat,
    NamedSchema,
    TextPart,
)
from tunefork.serve.api.completion_request import CompletionRequest
from tunefork.serve.api.errors import ApiError, bad, from_validation, unsupported
from tunefork.serve.api.gone import ClientGoneError
from tunefork.serve.api.sampling_fields import UNSUPPORTED, SamplingFields, StreamOptions
from tunefork.serve.gateway import Gateway
from tunefork.serve.tenants import Tenant

_SMALL_BYTES = 32 * 1024
"""Up to here parsing takes less than going to a thread does."""
_MOST_KEYS = 2048
_MOST_CONTAINERS = 16_384
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_MODELS: tuple[type[BaseModel], ...] = (
    *(ChatRequest, CompletionRequest, ChatMessage, TextPart, JsonSchemaFormat, NamedSchema),
    StreamOptions,
)
_KNOWN = frozenset(
    field.alias or name for model in _MODELS for name, field in model.model_fields.items()
)
Body = TypeVar("Body", bound=SamplingFields)


async def read_body(request: Request, gateway: Gateway, tenant: Tenant, model: type[Body]) -> Body:
    """The body as `model`. Raises ApiError (400, 413, 415)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Content-Type must be application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Content-Encoding is not supported", code="unsupported_media_type")
    try:
        content = await request.body()
    except ClientDisconnect as error:
        raise ClientGoneError from error
    if len(content) <= _SMALL_BYTES:
        return parse(content, model)
    body: Body = await gateway.read(tenant, parse, content, model)
    return body


def parse(content: bytes, model: type[Body]) -> Body:
    """JSON as `model`; raises ApiError (400)."""
    _check_containers(content)
    try:
        # Goes 200 levels deep at most, and refuses what is no Unicode.
        fields: Any = from_json(content, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise bad("The body is not JSON, or nested too deeply", None, "invalid_json") from error
    if not isinstance(fields, dict):
        raise bad("The body must be a JSON object", None, "invalid_type")
    _check_widths(fields)
    for name in fields.keys() & UNSUPPORTED.keys() - model.model_fields.keys():
        if fields[name] is not None:
            raise unsupported(name, UNSUPPORTED[name])
        del fields[name]
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error, _KNOWN, model.model_fields) from None


def _check_containers(content: bytes) -> None:
    """Refuse very many arrays and objects, of which each takes Python's time to make and to free.

    A text may hold as many brackets as it likes.
    """
    if content.count(b"[") + content.count(b"{") > _MOST_CONTAINERS:
        bare = _STRING.sub(b"", content)
        if bare.count(b"[") + bare.count(b"{") > _MOST_CONTAINERS:
            raise bad(f"The body has more than {_MOST_CONTAINERS} arrays and objects", None)


def _check_widths(fields: dict[str, Any]) -> None:
    """Refuse objects with very many keys: each unknown one would become an error of its own.

    Lists end at their first fault (`fail_fast`), so that of one that begins with a scalar no object
    further on is ever looked at.
    """
    left: list[Any] = [fields]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if len(value) > _MOST_KEYS:
                raise bad(f"An object has more than {_MOST_KEYS} keys", None)
            left += [v for v in value.values() if isinstance(v, dict | list)]
        elif isinstance(value, list) and value and isinstance(value[0], dict | list):
            left += value
