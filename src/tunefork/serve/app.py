"""The HTTP application: `create_app(engine, settings)`, for uvicorn or any other ASGI server."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from tunefork.serve.api.chat import create_chat_completion
from tunefork.serve.api.completions import create_completion
from tunefork.serve.api.errors import ApiError
from tunefork.serve.api.guard import Guard
from tunefork.serve.api.models import get_model, list_models
from tunefork.serve.api.operations import health, metrics, ready
from tunefork.serve.api.schema import describe
from tunefork.serve.choose import make_replica
from tunefork.serve.engine import Engine, ServedAdapter
from tunefork.serve.gateway import Gateway
from tunefork.serve.settings import ServeSettings

_ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("POST", "/v1/chat/completions", create_chat_completion),
    ("POST", "/v1/completions", create_completion),
    ("GET", "/v1/models", list_models),
    ("GET", "/v1/models/{model:path}", get_model),
    ("GET", "/health", health),
    ("GET", "/ready", ready),
    ("GET", "/metrics", metrics),
)

_NAMED = ", ".join(f"{method} {path}" for method, path, _ in _ROUTES[:3])
_KNOWN = f"this server answers {_NAMED} and a few more"


def create_app(
    engine: Engine,
    settings: ServeSettings,
    replicate: Callable[[ServedAdapter], Engine] | None = None,
) -> FastAPI:
    """The server over `engine`, which it starts in the background and stops at the end.

    `replicate` makes an engine with an adapter merged, for `settings.merge`.

    `app.state.gateway` is what it is made of.
    """
    gateway = Gateway(engine, settings, replicate or partial(make_replica, settings))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gateway.begin()
        try:
            yield
        finally:
            await gateway.stop()

    origins = settings.allowed_origins
    middleware = [Middleware(Guard, settings=settings)]
    if origins:  # around the guard: a browser shows a page no refusal that does not name its origin
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["*"],
            ),
        )
    app = FastAPI(
        title="tunefork",
        lifespan=lifespan,
        middleware=middleware,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={ApiError: _told, HTTPException: _as_api_error},
    )
    app.state.gateway = gateway
    for method, path, endpoint in _ROUTES:
        app.add_route(path, endpoint, methods=[method])
    describe(app, settings.base_name)
    return app


async def _told(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _as_api_error(_: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{error.detail}: {_KNOWN}" if code else str(error.detail)
    response = ApiError(error.status_code, message, code=code).response()
    response.headers.update(error.headers or {})
    return response
