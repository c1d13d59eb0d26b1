"""Whose answer is computed next: the tenant that was served the fewest tokens so far.

Virtual token counters: "Fairness in Serving Large Language Models" (Sheng et al. 2024,
https://arxiv.org/abs/2401.00588, algorithm 2), which S-LoRA uses over adapters. A tenant's counter
grows by its prompt's tokens when an answer begins and by twice each token of the answer, which cost
about so much more; the next to begin is the waiting tenant with the lowest counter. One that was
away is lifted to the lowest of those that wait, so that nobody saves up service. Tenants that
always have something waiting so get equal shares, whatever the lengths of their requests; idle
capacity goes to whoever asks.

Counters are divided by the tenant's weight: one of weight 2 gets two shares.

Each engine (the adapters', a merged replica's) computes so many answers at the same time; those of
one are no places of another. What a tenant was served counts wherever it was.

An answer whose adapter is in no slot takes a place and computes nothing until it is. So of each
such adapter one answer is let in before it is there, of so many adapters as have slots, and in half
of the places at most; others that the engine could begin with go first.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import islice

PROMPT_COST = 1.0
ANSWER_COST = 2.0
"""Of a token; the paper's w_p and w_q."""
_SEEN = 64
"""Waiting answers of a tenant that are looked through for one that can begin."""


class QueueFullError(Exception):
    """No more may wait; `retry_after` seconds later some will."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


@dataclass(eq=False)
class _Pool:
    """One engine's places."""

    places: int
    running: int = 0
    waiting: int = 0
    coming: "dict[str, Turn]" = field(default_factory=dict)
    """Adapters that are in no slot, and whose answer waits for them in the engine."""


@dataclass
class _Lane:
    """One tenant."""

    weight: float
    counter: float = 0.0
    waiting: "dict[_Pool, deque[Turn]]" = field(default_factory=lambda: defaultdict(deque))

    @property
    def num_waiting(self) -> int:
        """For any engine."""
        return sum(map(len, self.waiting.values()))


class Turn:
    """One answer's place: waiting, then running, then over. Belongs to one task."""

    def __init__(
        self,
        queue: "FairQueue",
        lane: _Lane,
        pool: _Pool,
        prompt_tokens: int,
        adapter: str | None,
    ) -> None:
        self._queue, self._lane, self._pool = queue, lane, pool
        self.prompt_tokens, self.adapter = prompt_tokens, adapter
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait(self) -> None:
        """Until the engine has room for this answer."""
        await self.granted

    def begins(self) -> None:
        """The engine has told something of it: its adapter is there. Idempotent."""
        self._queue.came(self, self._pool)

    def charge(self, tokens: int) -> None:
        """Tokens of the answer that were computed."""
        self._lane.counter += ANSWER_COST * tokens / self._lane.weight

    def leave(self) -> None:
        """The answer is complete, or no longer wanted; idempotent."""
        self._queue.left(self, self._lane, self._pool)


class FairQueue:
    """Answers of all tenants; at most `most_running` of them run. Used from one event loop."""

    def __init__(
        self,
        most_running: int,
        most_waiting: int,
        most_waiting_per_tenant: int,
        *,
        slots: int = 0,
        resident: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """`slots` of the adapters' engine, and which adapters are in them now; 0: it has none that
        anybody could wait for."""
        self._main = _Pool(most_running)
        self._resident = resident
        self._most_coming = max(1, min(slots, most_running // 2)) if slots else 0
        self._pools: dict[object, _Pool] = {}
        self._most_waiting, self._most_per_tenant = most_waiting, most_waiting_per_tenant
        self._lanes: dict[str, _Lane] = {}
        self._last: _Lane | None = None
        """The tenant that last had something waiting; its counter grows while its answers run."""
        self._turns: set[Turn] = set()
        self._begun: dict[Turn, float] = {}
        self._mean_s = 1.0

    def add_places(self, engine: object, places: int) -> None:
        """Answers of `engine` have places of their own."""
        self._pools[engine] = _Pool(places)

    @property
    def running(self) -> int:
        """Answers that have begun."""
        return sum(pool.running for pool in (self._main, *self._pools.values()))

    @property
    def waiting(self) -> int:
        """Answers that have not."""
        return sum(pool.waiting for pool in (self._main, *self._pools.values()))

    def enter(
        self,
        tenant: str,
        weight: float,
        prompt_tokens: list[int],
        engine: object = None,
        adapter: str | None = None,
    ) -> list[Turn]:
        """Places for answers to prompts of so many tokens: all of them, or QueueFullError.

        `adapter`: id of the one that they need a slot for."""
        lane = self._lanes.setdefault(tenant, _Lane(weight))
        lane.weight = weight
        pool = self._pools.get(engine, self._main)
        count = len(prompt_tokens)
        free = max(0, pool.places - pool.running - pool.waiting)
        over = count - free
        if over > 0 and (
            self.waiting + over > self._most_waiting
            or lane.num_waiting + over > self._most_per_tenant
        ):
            raise QueueFullError(self._wait_s(pool))
        if not lane.num_waiting:
            self._lift(lane)
        turns = [Turn(self, lane, pool, tokens, adapter) for tokens in prompt_tokens]
        lane.waiting[pool].extend(turns)
        self._turns.update(turns)
        pool.waiting += count
        self._begin(pool)
        return turns

    def left(self, turn: Turn, lane: _Lane, pool: _Pool) -> None:
        """`turn` is over; called by `Turn.leave`."""
        if turn not in self._turns:
            return
        self._turns.discard(turn)
        begun = self._begun.pop(turn, None)
        if begun is None:
            lane.waiting[pool].remove(turn)
            pool.waiting -= 1
            if not lane.num_waiting:
                self._last = lane
        else:
            pool.running -= 1
            self._is_here(turn, pool)
            self._mean_s += 0.1 * (asyncio.get_running_loop().time() - begun - self._mean_s)
        self._begin(pool)

    def came(self, turn: Turn, pool: _Pool) -> None:
        """`turn` needs nothing any more; called by `Turn.begins`."""
        if self._is_here(turn, pool):
            self._begin(pool)

    def look(self) -> None:
        """Begin what can be begun: adapters may have come into slots without an answer."""
        self._begin(self._main)

    def waiting_by_tenant(self) -> dict[str, int]:
        """How many answers of each tenant wait."""
        return {name: lane.num_waiting for name, lane in self._lanes.items()}

    def _lift(self, lane: _Lane) -> None:
        others = [other.counter for other in self._lanes.values() if other.num_waiting]
        if not others and self._last is not None:
            others = [self._last.counter]
        lane.counter = max(lane.counter, min(others, default=0.0))

    def _begin(self, pool: _Pool) -> None:
        if pool.running >= pool.places or not pool.waiting:
            return
        resident = frozenset(self._resident())
        while pool.running < pool.places:
            nexts = [(lane, self._next(lane, pool, resident)) for lane in self._lanes.values()]
            able = [(lane, turn) for lane, turn in nexts if turn is not None]
            if not able:
                return
            lane, turn = min(able, key=lambda one: one[0].counter)
            lane.waiting[pool].remove(turn)
            pool.waiting -= 1
            pool.running += 1
            if self._is_to_come(turn, resident):
                assert turn.adapter is not None
                pool.coming[turn.adapter] = turn
            lane.counter += PROMPT_COST * turn.prompt_tokens / lane.weight
            if not lane.num_waiting:
                self._last = lane
            self._begun[turn] = asyncio.get_running_loop().time()
            if not turn.granted.done():
                turn.granted.set_result(None)

    def _next(self, lane: _Lane, pool: _Pool, resident: Collection[str]) -> Turn | None:
        """The first that the engine can begin with, or that it may wait for an adapter with."""
        is_full = len(pool.coming) >= self._most_coming
        for turn in islice(lane.waiting[pool], _SEEN):
            if not self._is_to_come(turn, resident):
                return turn
            if not is_full and turn.adapter not in pool.coming:
                return turn
        return None

    def _is_to_come(self, turn: Turn, resident: Collection[str]) -> bool:
        return self._most_coming > 0 and turn.adapter is not None and turn.adapter not in resident

    def _is_here(self, turn: Turn, pool: _Pool) -> bool:
        """Whether its adapter was to come until now."""
        if turn.adapter is None or pool.coming.get(turn.adapter) is not turn:
            return False
        del pool.coming[turn.adapter]
        return True

    def _wait_s(self, pool: _Pool) -> float:
        """About how long until there is room: a mean duration sees all of a pool's answers off."""
        return min(60.0, max(1.0, self._mean_s * pool.waiting / max(1, pool.places) / 2))
