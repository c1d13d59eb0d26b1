"""An engine that died is started again: at once, then at intervals that double up to a minute.

One that starts and dies at once is of no more use than one that does not start, so that only a life
of a minute ends the series. Why it died is for the log alone: clients are told how often it failed,
and when it is tried again.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from tunefork.errors import TuneforkError
from tunefork.serve.engine import Engine

_FIRST_S, _MOST_S = 1.0, 60.0
"""The first interval that is not nothing, and the longest."""
_START_S = 5.0
"""A client that asks while it starts may come again in so many seconds."""
logger = logging.getLogger(__name__)


async def _nothing() -> None:
    """There is nothing to do."""


class Revival:
    """Of one engine, once it was started; from one event loop."""

    def __init__(
        self, engine: Engine, name: str, then: Callable[[], Awaitable[None]] = _nothing
    ) -> None:
        """`then` is awaited when it is up again, before it counts as such."""
        self.engine, self._name, self._then = engine, name, then
        self.failures = 0
        """Deaths and starts that failed, since it last lived for long."""
        self._wait_s = 0.0
        """Before the next start."""
        self._up_since, self._due = time.monotonic(), 0.0
        self._task: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Begin, if it has died; due every second."""
        if not self.is_at_work and not self.engine.state().healthy:
            self._task = asyncio.create_task(self._revive())

    @property
    def is_at_work(self) -> bool:
        """It has died, and is not up again."""
        return self._task is not None and not self._task.done()

    def retry_after(self) -> float:
        """Seconds until another request might be answered."""
        return max(self._due - time.monotonic(), _START_S)

    async def stop(self) -> None:
        """Leave it as it is."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _revive(self) -> None:
        if time.monotonic() - self._up_since > _MOST_S:
            self.failures, self._wait_s = 0, 0.0
        what = f"{self._name} died: {self.engine.state().why or 'it does not say why'}"
        while True:
            wait_s = self._wait_s
            self._wait_s = min(_MOST_S, max(_FIRST_S, 2 * wait_s))
            self._due = time.monotonic() + wait_s
            self.failures += 1
            logger.error("%s; it is started again in %.0f s, try %d", what, wait_s, self.failures)
            try:
                try:  # before it waits: what it holds may be in the way of another's start
                    await self.engine.stop()
                finally:
                    await asyncio.sleep(wait_s)
                await self.engine.start()
                break
            except Exception as error:
                # The text alone: the error's traceback holds what was loaded.
                said = str(error) if isinstance(error, TuneforkError) else repr(error)
                what = f"{self._name} cannot be started: {said}"
        await self._then()
        self._up_since = time.monotonic()
