"""Server-sent events of an answer that is on its way.

The first piece is waited for before anything is sent, so that what fails early has its status. What
fails later is the last event. A client that leaves the stream unread for too long is cut off.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus

from tunefork.serve.api.errors import ApiError

DONE = b"data: [DONE]\n\n"


def event(fields: dict[str, Any]) -> bytes:
    """One event of JSON."""
    return b"data: " + to_json(fields) + b"\n\n"


def to_json(fields: Any) -> bytes:
    """Compact, in UTF-8."""
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def respond(events: AsyncIterator[bytes], *, stall_timeout_s: float) -> EventSourceResponse:
    """The response that sends `events`."""
    # Streams end when their answers do: uvicorn waits for them, as long as it is told to.
    AppStatus.enable_automatic_graceful_drain = False
    return EventSourceResponse(_to_the_end(events), send_timeout=stall_timeout_s, sep="\n")


async def _to_the_end(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for data in events:
            yield data
    except ApiError as error:
        yield event(error.body())
