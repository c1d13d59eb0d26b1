"""Whether anyone still waits: work for a client that went away is cancelled at once."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from starlette.types import Receive

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The connection was closed before there was an answer."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns; cancels it and raises ClientGoneError where the client goes away.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watch):
            if not each.done():
                each.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await each


async def gone(receive: Receive) -> None:
    """Returns once the client has gone away; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
