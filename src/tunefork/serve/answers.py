"""One request on its way through queue and engine: n answers to each of its prompts.

Each answer is a task that waits for its turn, reads the engine and puts pieces where the response
takes them from. Where nobody takes them, it stops reading; where nobody wants them any more, it is
cancelled, and the engine frees what it held. However it ends, what was computed is recorded once,
tokens that an engine had ahead and nobody read among it. A request that the engine refuses before
any token is recorded as none.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal, cast

from tunefork.errors import BadInputError, EngineBusyError, TuneforkError
from tunefork.serve.api.errors import ApiError, unavailable
from tunefork.serve.engine import EngineRequest, Piece
from tunefork.serve.fair import QueueFullError, Turn
from tunefork.serve.ledger import Usage
from tunefork.serve.order import Order, told_of, too_late
from tunefork.serve.parts import Parts

_CANCEL_S = 30.0
"""An engine has to let go of a cancelled answer, before it is recorded as it is."""
_MOST_UNREAD = 256
"""Pieces that wait for a client; then the engine's are no longer read."""
Status = Literal["ok", "cancelled", "deadline", "refused", "failed"]
logger = logging.getLogger(__name__)


class Answer:
    """An order that has begun. `take` pieces until there is None, then `finish`."""

    def __init__(self, parts: Parts, order: Order) -> None:
        """Take places in the queue. Raises ApiError (429) where there are none, or no quota."""
        self.order = order
        self.completion_tokens = 0
        self.prompt_tokens = 0
        """Of prompts that the engine was given."""
        self._parts = parts
        self._began = time.monotonic()
        self._first_token_s: float | None = None
        self._failure: BaseException | None = None
        self._is_refused = False
        self._given: set[int] = set()
        self._pieces: list[tuple[int, Piece]] = []
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._open = len(order.prompts) * order.choices
        self._read = [0] * self._open
        """Tokens of each answer that are counted."""
        self._ending: asyncio.Task[None] | None = None
        parts.quotas.reserve(order.tenant, order.most_tokens)
        try:
            turns = self._enter()
        except BaseException:
            parts.quotas.release(order.tenant, order.most_tokens)
            raise
        if order.adapter is not None and not all(turn.granted.done() for turn in turns):
            parts.keep(asyncio.create_task(order.engine.prefetch(order.adapter)))
        self._tasks = [asyncio.create_task(self._run(i, turn)) for i, turn in enumerate(turns)]

    async def take(self) -> list[tuple[int, Piece]] | None:
        """The pieces that came since, each with the index of its answer; None: that was all.

        Raises ApiError where the request failed.
        """
        while not self._pieces and self._failure is None:
            if self._open == 0:
                return None
            self._news.clear()
            await self._news.wait()
        if self._failure is not None:
            raise self._failure
        pieces, self._pieces = self._pieces, []
        self._room.set()
        return pieces

    async def finish(self) -> None:
        """Put it on record, before the client is told that it is complete. Raises ApiError."""
        self._ending = self._ending or asyncio.create_task(self._end("ok"))
        try:
            await asyncio.shield(self._ending)
        except TuneforkError as error:
            logger.error("%s", error)
            raise unavailable(
                "usage_unrecorded", "The answer could not be recorded; try again", 5.0
            ) from error

    def abandon(self) -> None:
        """Nobody waits for it any more; what was computed is recorded. After `finish`: nothing."""
        if self._ending is None:
            status: Status = "cancelled"
            if self._failure is not None:
                status = _status_of(self._failure)
            self._ending = asyncio.create_task(self._end(status))
            self._parts.keep(self._ending)

    def _enter(self) -> list[Turn]:
        order = self.order
        lengths = [len(ids) for ids in order.prompts for _ in range(order.choices)]
        try:
            return self._parts.queue.enter(
                order.tenant.name,
                order.tenant.weight,
                lengths,
                order.engine,
                None if order.adapter is None else order.adapter.id,
            )
        except QueueFullError as error:
            self._parts.metrics.refused(order.tenant.name, "queue")
            raise ApiError(
                429,
                "Too many answers are waiting; try again later",
                kind="requests",
                code="queue_full",
                retry_after=error.retry_after,
            ) from error

    async def _run(self, index: int, turn: Turn) -> None:
        loop = asyncio.get_running_loop()
        left_s = self.order.deadline - time.monotonic()
        try:
            async with asyncio.timeout_at(loop.time() + left_s):
                await turn.wait()
                await self._compute(index, turn)
        except asyncio.CancelledError:
            raise
        except TimeoutError:
            self._fail(too_late())
        except Exception as error:
            self._is_refused |= isinstance(error, BadInputError | EngineBusyError)
            self._fail(told_of(error, self.order.sampling))
        finally:
            turn.leave()

    async def _compute(self, index: int, turn: Turn) -> None:
        prompt = self.order.prompts[index // self.order.choices]
        if index // self.order.choices not in self._given:  # n answers read one prompt once
            self._given.add(index // self.order.choices)
            self._spend(len(prompt))
            self.prompt_tokens += len(prompt)
        request = self._request(index, prompt)
        # Whatever an engine returns can be closed, as its protocol says.
        pieces = cast("AsyncGenerator[Piece]", self.order.engine.generate(request))
        try:
            await self._take_in(index, pieces, turn)
        finally:
            self._count(index, request.meter.tokens - self._read[index], turn)

    async def _take_in(self, index: int, pieces: AsyncGenerator[Piece], turn: Turn) -> None:
        async with aclosing(pieces):
            async for piece in pieces:
                turn.begins()
                self._count(index, len(piece.token_ids), turn)
                if piece.finish_reason == "deadline":
                    raise TimeoutError
                if piece.finish_reason == "cancelled":
                    raise unavailable("engine_failed", "The answer was interrupted; try again", 1.0)
                while len(self._pieces) >= _MOST_UNREAD:
                    self._room.clear()
                    await self._room.wait()
                self._pieces.append((index, piece))
                self._news.set()
                if piece.finish_reason is not None:
                    self._open -= 1
                    return
        raise unavailable("engine_failed", "The engine ended without an answer; try again", 1.0)

    def _request(self, index: int, prompt: tuple[int, ...]) -> EngineRequest:
        order, sampling = self.order, self.order.sampling
        if sampling.seed is not None:  # else all choices would be the same
            sampling = replace(sampling, seed=(sampling.seed + index % order.choices) % 2**63)
        return EngineRequest(
            id=f"{order.id}-{index}",
            prompt_ids=prompt,
            sampling=sampling,
            adapter=order.adapter,
            tenant=order.tenant.name,
            deadline=order.deadline,
        )

    def _count(self, index: int, tokens: int, turn: Turn) -> None:
        if tokens <= 0:
            return
        if self._first_token_s is None:
            self._first_token_s = time.monotonic() - self._began
        self._read[index] += tokens
        self.completion_tokens += tokens
        turn.charge(tokens)
        self._spend(tokens)

    def _spend(self, tokens: int) -> None:
        self._parts.quotas.spend(self.order.tenant, tokens)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._news.set()

    async def _end(self, status: Status) -> None:
        for task in self._tasks:
            task.cancel()
        _, hanging = await asyncio.wait(self._tasks, timeout=_CANCEL_S)
        if hanging:
            logger.error("%s: the engine does not let %d answers go", self.order.id, len(hanging))
        if self._is_refused and not self.completion_tokens:
            self._spend(-self.prompt_tokens)
            self.prompt_tokens = 0
        order, total_s = self.order, time.monotonic() - self._began
        try:
            await self._parts.ledger.record(
                Usage(
                    id=order.id,
                    ended=datetime.now(UTC).isoformat(timespec="milliseconds"),
                    tenant=order.tenant.name,
                    key_id=order.key_id,
                    endpoint=order.endpoint,
                    model=order.model,
                    end_user=order.end_user,
                    status=status,
                    choices=len(order.prompts) * order.choices,
                    prompt_tokens=self.prompt_tokens,
                    completion_tokens=self.completion_tokens,
                    first_token_s=self._first_token_s,
                    total_s=total_s,
                )
            )
        finally:
            self._parts.quotas.release(order.tenant, order.most_tokens)
            if order.lease is not None:
                order.lease.release()
            self._parts.metrics.ended(
                order.tenant.name,
                order.model,
                status,
                prompt_tokens=self.prompt_tokens,
                completion_tokens=self.completion_tokens,
                choices=len(order.prompts) * order.choices,
                first_token_s=self._first_token_s,
                total_s=total_s,
            )


def _status_of(failure: BaseException) -> Status:
    if not isinstance(failure, ApiError):
        return "failed"
    if failure.code == "deadline_exceeded":
        return "deadline"
    return "refused" if failure.status < 500 else "failed"
