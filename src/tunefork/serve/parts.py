"""What an answer needs of the server around it, so that nothing is global."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from tunefork.serve.fair import FairQueue
from tunefork.serve.ledger import Ledger
from tunefork.serve.metrics import Metrics
from tunefork.serve.quotas import Quotas


@dataclass(frozen=True)
class Parts:
    """Queue, quotas, usage and metrics of one server."""

    queue: FairQueue
    quotas: Quotas
    ledger: Ledger
    metrics: Metrics
    _tasks: set["asyncio.Task[Any]"] = field(default_factory=set)

    def keep(self, task: "asyncio.Task[Any]") -> None:
        """Let a task go on that nobody waits for; the server does, before it ends."""
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def settle(self) -> None:
        """Wait for them."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()
