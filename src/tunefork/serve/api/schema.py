"""The OpenAPI document.

Bodies are read by hand (`reading.py`), so it is put together here, from the very models that they
are checked against.
"""

from functools import lru_cache, partial
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tunefork.serve.api.chat_request import ChatRequest
from tunefork.serve.api.completion_request import CompletionRequest
from tunefork.serve.api.errors import ErrorBody
from tunefork.serve.api.responses import ChatCompletion, Completion, Health, ModelInfo, ModelList

_REF = "#/components/schemas/{model}"
_ERRORS = {
    400: "The request cannot be honoured.",
    401: "No valid key.",
    403: "Host or Origin is not allowed.",
    404: "No such model.",
    408: "The request took too long to arrive.",
    413: "The request is too large.",
    415: "The body is not JSON.",
    429: "A quota is used up, or the queue is full.",
    503: "Try again after Retry-After.",
}
_LATER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}


def describe(app: FastAPI, base_name: str) -> None:
    """Let `app` hand the document out at /openapi.json; `base_name` is a model that there is."""
    app.openapi = lru_cache(maxsize=1)(partial(_document, base_name))  # type: ignore[method-assign]


def _document(base_name: str) -> dict[str, Any]:
    sent = (ChatCompletion, Completion, ModelInfo, ModelList, Health, ErrorBody)
    pairs = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
    pairs += [(model, "serialization") for model in sent]
    schemas = models_json_schema(pairs, ref_template=_REF)[1]["$defs"]  # type: ignore[arg-type]
    for model, _ in pairs[:2]:
        schemas[model.__name__]["properties"]["model"]["examples"] = [base_name]
    asked = (400, 404, 408, 413, 415, 429)
    path = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tunefork",
            "version": "1",
            "description": "One base, many adapters; the OpenAI API.",
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _operation("Answer a conversation.", ChatCompletion, asked, ChatRequest)
            },
            "/v1/completions": {
                "post": _operation("Write on a text.", Completion, asked, CompletionRequest)
            },
            "/v1/models": {"get": _operation("All models of this key.", ModelList, (429,))},
            "/v1/models/{model}": {
                "get": _operation("One of them.", ModelInfo, (404, 429)) | {"parameters": [path]}
            },
            "/health": {"get": _operation("Whether the process is well.", Health, ())},
            "/ready": {"get": _operation("Whether requests are taken.", Health, ())},
            "/metrics": {"get": _operation("For Prometheus.", None, ())},
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(
    summary: str,
    answer: type[BaseModel] | None,
    errors: tuple[int, ...],
    body: type[BaseModel] | None = None,
) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if answer is not None:
        content = {"application/json": {"schema": {"$ref": _REF.format(model=answer.__name__)}}}
    if body is not None:
        content["text/event-stream"] = {"schema": {"description": "With `stream`."}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    error = {"application/json": {"schema": {"$ref": _REF.format(model=ErrorBody.__name__)}}}
    for status in sorted({401, 403, 503, *errors}):
        responses[str(status)] = {"description": _ERRORS[status], "content": error}
        if status in (429, 503):
            responses[str(status)]["headers"] = _LATER
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if body is not None:
        schema = {"schema": {"$ref": _REF.format(model=body.__name__)}}
        operation["requestBody"] = {"required": True, "content": {"application/json": schema}}
    return operation
