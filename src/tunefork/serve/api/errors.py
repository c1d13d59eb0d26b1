"""Errors as the API tells them: {"error": {"message", "type", "param", "code"}} and a status.

A message never holds a path, a key or a text of the request: it may end in a log of others. There
is no status above 499 but 503, which always says when to try again.
"""

import errno
import math
from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse

from tunefork.errors import nearest

_OF_MESSAGES = frozenset(
    ["name", "tool_calls", "tool_call_id", "function_call", "refusal", "audio"]
)
"""Fields of the API's messages that no chat template here is given."""
_OF_NOW = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)


class ErrorInfo(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    message: str
    type: str
    param: str | None
    """The field of the request that is to blame."""
    code: str | None


class ErrorBody(BaseModel):
    """Of every answer that is an error."""

    error: ErrorInfo


class ApiError(Exception):
    """Ends a request with an error of the API's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    def body(self) -> dict[str, Any]:
        """As JSON."""
        info = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": info}

    def response(self) -> JSONResponse:
        """As an answer."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def bad(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """A request that cannot be honoured as it is."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    """A parameter that exists in the API, but is not honoured here."""
    return bad(f"{param}: is not supported: {why}", param, "unsupported_parameter")


def no_such_model() -> ApiError:
    """The same for a model that does not exist and for one that is another tenant's."""
    return ApiError(
        404,
        "The model does not exist, or this key has no access to it; GET /v1/models lists all that "
        "it has.",
        param="model",
        code="model_not_found",
    )


Unavailable = Literal[
    "starting",
    "draining",
    "engine_failed",
    "overloaded",
    "no_memory",
    "deadline_exceeded",
    "adapter_unreadable",
    "store_unusable",
    "usage_unrecorded",
    "internal_error",
]


def unavailable(code: Unavailable, message: str, after: float) -> ApiError:
    """Nothing that the client did; worth another try in `after` seconds."""
    return ApiError(503, message, kind="server_error", code=code, retry_after=after)


def from_validation(
    error: ValidationError, known: frozenset[str], own: Collection[str]
) -> ApiError:
    """The error of a request that its model refuses; `known` are all names of fields, `own` those
    of the model itself."""
    details = error.errors(include_input=False, include_url=False)
    first = details[0]["loc"][:1]
    # Of a choice of types, the branch that came farthest is the one that was meant, and one whose
    # type is right rather than one whose is not.
    detail = max(
        (d for d in details if d["loc"][:1] == first),
        key=lambda d: (len(d["loc"]), not d["type"].endswith("_type")),
    )
    kind, loc = detail["type"], list(detail["loc"])
    name = str(loc[-1]) if loc else ""
    if loc[:1] == ["response_format"]:
        loc[1:2] = []  # the tag of the choice
    is_unknown = kind == "extra_forbidden"
    parts = [p for p in loc[:-1] if isinstance(p, int) or p in known]
    parts += [p for p in loc[-1:] if is_unknown or isinstance(p, int) or p in known]
    param = _joined(parts)
    if is_unknown:
        if loc[0] == "messages" and name in _OF_MESSAGES:
            return unsupported(param, "a message has a role and a content here, and nothing else")
        shown = param if name.isprintable() and len(name) <= 64 else "a field"
        is_misplaced = name in known  # in another route, or another part of the request
        meant = own if len(loc) == 1 else known
        hint = "" if is_misplaced or len(name) > 64 else nearest(name, sorted(meant))
        return bad(f"{shown}: unknown field{hint}", shown, "unknown_parameter")
    if kind == "missing":
        return bad(f"{param}: is missing", param, "missing_required_parameter")
    if kind == "union_tag_invalid":  # whose message quotes what was sent
        allowed = detail["ctx"]["expected_tags"]
        return bad(f"{param}.type: should be one of {allowed}", f"{param}.type")
    message = _said(detail)
    return bad(f"{param}: {message}" if param else message, param or None)


def _said(detail: ErrorDetails) -> str:
    """pydantic's message in the words of JSON, not of Python."""
    match detail["type"]:
        case "none_required":
            return "should be null"
        case "model_attributes_type" | "model_type" | "dict_type":
            return "should be an object"
    message = str(detail["msg"]).removeprefix("Value error, ").removesuffix(" after validation")
    message = message.replace(" after validation,", ",")
    for subject in ("Input ", "List ", "String ", "Dictionary "):
        message = message.removeprefix(subject)
    return message


def _joined(parts: list[int | str]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def is_of_now(error: BaseException) -> bool:
    """Whether a file could not be read for a reason that passes."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _OF_NOW
