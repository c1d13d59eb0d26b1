"""Before any route: where a request may come from, how large it may be, how many there may be.

Host and Origin are checked because a page in somebody's browser can reach a server on the loopback
interface: by DNS rebinding under the page's own name, or across origins. A name that is an IP
address cannot be rebound. Whatever fails unforeseen ends as a 503 of the API's shape.
"""

import asyncio
import ipaddress
import logging
import socket
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunefork.serve.api.errors import ApiError, unavailable
from tunefork.serve.api.gone import ClientGoneError
from tunefork.serve.api.stream import event, is_stream
from tunefork.serve.settings import LOOPBACK, ServeSettings

_LAST_WORDS_S = 1.0
"""A client that a stopping server answers has as long to read why."""
_ALWAYS = ("/health", "/ready", "/metrics")
"""Answered however many requests there are."""
_MOST_LARGE = 64
"""Bodies of the largest size that are held at the same time, or more smaller ones."""
_MOST_LARGE_PER_TENANT = 32
"""The same of one tenant, so that its own do not keep the others' out."""
logger = logging.getLogger(__name__)


class Guard:
    """An ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings
        self._open = 0
        self._held_bytes: Counter[str] = Counter()
        """Of bodies of requests that are open, by tenant."""
        own = () if settings.is_loopback else (socket.gethostname(), socket.getfqdn())
        names = (*LOOPBACK, *own, *settings.allowed_hosts)
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            elif scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        scope["cleanup"], scope["limits"], scope["tenant"] = [], dict, ""
        sending, body = _Sending(send, scope), _Body()
        self._open += 1
        try:
            self._check(scope)
            await self._app(scope, self._bounded(scope, receive, body), sending)
        except ApiError as error:
            await self._end(error, scope, receive, sending)
        except ClientGoneError:
            pass
        except asyncio.CancelledError:  # the server ends, and waits for no answer any more
            told = unavailable("draining", "The server has stopped; try another", 5.0)
            with suppress(TimeoutError):  # a client may read nothing
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._end(told, scope, receive, sending)
        except Exception as error:
            logger.error("a request failed", exc_info=error)
            told = unavailable("internal_error", "The server failed; try again", 1.0)
            await self._end(told, scope, receive, sending)
        finally:
            self._open -= 1
            self._held_bytes[scope["tenant"]] -= body.num_bytes
            for clean in scope["cleanup"]:
                clean()

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if not self._is_allowed(headers.get(b"host", "")):
            raise ApiError(
                403,
                "The Host header names another server than this; its operator can allow it "
                "(allowed_hosts)",
                code="host_not_allowed",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin not in self._settings.allowed_origins:
            same = f"{scope['scheme']}://{headers.get(b'host', '')}"
            if origin.lower() != same.lower():
                raise ApiError(
                    403,
                    "Pages of this origin may not call the server; its operator can allow it "
                    "(allowed_origins)",
                    code="origin_not_allowed",
                )
        if scope["path"] not in _ALWAYS and self._open > self._settings.max_open_requests:
            raise unavailable("overloaded", "Too many requests at the same time", 1.0)
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._settings.max_body_bytes:
            raise self._too_large()

    def _is_allowed(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._settings.is_loopback

    def _bounded(self, scope: Scope, receive: Receive, body: "_Body") -> Receive:
        """`receive`, which ends a body that is too long or too slow."""
        until = asyncio.get_running_loop().time() + self._settings.body_timeout_s

        async def bounded() -> Message:
            if body.is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(408, "The request took too long to arrive") from error
            num_bytes = len(message.get("body", b""))
            body.num_bytes += num_bytes
            self._held_bytes[scope["tenant"]] += num_bytes
            if body.num_bytes > self._settings.max_body_bytes:
                raise self._too_large()
            if self._is_too_much(scope["tenant"]):
                raise unavailable("overloaded", "Too many large requests at the same time", 1.0)
            body.is_complete = not message.get("more_body", False)
            return message

        return bounded

    def _is_too_much(self, tenant: str) -> bool:
        largest = self._settings.max_body_bytes
        own, all_bytes = self._held_bytes[tenant], self._held_bytes.total()
        return own > _MOST_LARGE_PER_TENANT * largest or all_bytes > _MOST_LARGE * largest

    def _too_large(self) -> ApiError:
        most = self._settings.max_body_bytes
        return ApiError(413, f"The body is larger than {most} bytes", code="request_too_large")

    async def _end(
        self, error: ApiError, scope: Scope, receive: Receive, sending: "_Sending"
    ) -> None:
        if sending.has_begun:
            if sending.is_stream and not sending.has_ended:
                last = event(error.body())
                await sending({"type": "http.response.body", "body": last, "more_body": False})
            return  # another half answer cannot be mended: the connection is closed
        response = error.response()
        if error.status in (408, 413, 503):
            response.headers["Connection"] = "close"  # the rest of the body is not read
        await response(scope, receive, sending)


@dataclass
class _Body:
    """A request's, as far as it came."""

    num_bytes: int = 0
    is_complete: bool = False


class _Sending:
    """Remembers whether an answer has begun, and adds what every answer has."""

    def __init__(self, send: Send, scope: Scope) -> None:
        self._send, self._scope = send, scope
        self.has_begun = self.is_stream = self.has_ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            self.is_stream = is_stream(message)
            limits: dict[str, str] = self._scope["limits"]()
            headers = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            headers += [(name.encode(), value.encode()) for name, value in limits.items()]
            message = {**message, "headers": headers}
        elif not message.get("more_body", False):
            self.has_ended = True
        await self._send(message)
