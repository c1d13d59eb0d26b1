"""Server-sent events of an answer that is on its way.

The first piece is waited for before anything is sent, so that what fails early has its status. What
fails later is the last event. A client that goes away is noticed while the engine computes, one
that leaves the stream unread for too long is cut off.

By hand, and not by sse-starlette: each token of each stream comes through here, in the process of
the embedded engine, and that has a scope, a lock and a timer for each. It also ends all streams at
the first sign of a shutdown, where ours finish.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from tunefork.serve.api.errors import ApiError
from tunefork.serve.api.gone import ClientGoneError, gone

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would keep events back
]


def is_stream(start: Message) -> bool:
    """Whether the answer that begins with `start` is such a stream."""
    return _HEADERS[0] in start.get("headers", ())


def event(fields: dict[str, Any]) -> bytes:
    """One event of JSON."""
    return b"data: " + to_json(fields) + b"\n\n"


def chunk_head(fields: dict[str, Any]) -> bytes:
    """What all chunks of a stream begin with, written once; see `chunk`."""
    return b"data: " + to_json(fields)[:-1] + b',"choices":['


def chunk(head: bytes, choice: dict[str, Any]) -> bytes:
    """The event of one choice."""
    return head + to_json(choice) + b"]}\n\n"


def to_json(fields: Any) -> bytes:
    """Compact, in UTF-8."""
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class EventStream:
    """A response that sends `events`."""

    def __init__(self, events: AsyncIterator[bytes], *, stall_timeout_s: float) -> None:
        self._events, self._stall_timeout_s = events, stall_timeout_s
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ClientGoneError where the client went away, or stopped reading."""
        sending = asyncio.ensure_future(self._send(send))
        watch = asyncio.ensure_future(gone(receive))
        try:
            while not sending.done():
                await asyncio.wait(
                    {sending, watch},
                    timeout=self._stall_timeout_s / 4,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not sending.done() and (watch.done() or self._is_stalled()):
                    raise ClientGoneError
            sending.result()
        finally:
            for task in (sending, watch):
                if not task.done():
                    task.cancel()
                    with suppress(asyncio.CancelledError, Exception):
                        await task

    async def _send(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            async for data in self._events:
                self._sending_since = clock()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._sending_since = None
        except ApiError as error:
            last = event(error.body())
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _is_stalled(self) -> bool:
        """Whether the connection has taken nothing for too long."""
        since = self._sending_since
        return since is not None and (
            asyncio.get_running_loop().time() - since >= self._stall_timeout_s
        )
