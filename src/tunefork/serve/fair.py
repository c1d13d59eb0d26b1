"""Whose answer is computed next: the tenant that was served the fewest tokens so far.

Virtual token counters: "Fairness in Serving Large Language Models" (Sheng et al. 2024,
https://arxiv.org/abs/2401.00588, algorithm 2), which S-LoRA uses over adapters. A tenant's counter
grows by its prompt's tokens when an answer begins and by twice each token of the answer, which cost
about so much more; the next to begin is the waiting tenant with the lowest counter. One that was
away is lifted to the lowest of those that wait, so that nobody saves up service. Tenants that
always have something waiting so get equal shares, whatever the lengths of their requests; idle
capacity goes to whoever asks.

Counters are divided by the tenant's weight: one of weight 2 gets two shares.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field

PROMPT_COST = 1.0
ANSWER_COST = 2.0
"""Of a token; the paper's w_p and w_q."""


class QueueFullError(Exception):
    """No more may wait; `retry_after` seconds later some will."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


@dataclass
class _Lane:
    """One tenant."""

    weight: float
    counter: float = 0.0
    waiting: "deque[Turn]" = field(default_factory=deque)
    running: int = 0


class Turn:
    """One answer's place: waiting, then running, then over. Belongs to one task."""

    def __init__(self, queue: "FairQueue", lane: _Lane, prompt_tokens: int) -> None:
        self._queue, self._lane = queue, lane
        self.prompt_tokens = prompt_tokens
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait(self) -> None:
        """Until the engine has room for this answer."""
        await self.granted

    def charge(self, tokens: int) -> None:
        """Tokens of the answer that were computed."""
        self._lane.counter += ANSWER_COST * tokens / self._lane.weight

    def leave(self) -> None:
        """The answer is complete, or no longer wanted; idempotent."""
        self._queue.left(self, self._lane)


class FairQueue:
    """Answers of all tenants; at most `most_running` of them run. Used from one event loop."""

    def __init__(self, most_running: int, most_waiting: int, most_waiting_per_tenant: int) -> None:
        self.most_running = most_running
        self.running = 0
        self.waiting = 0
        self._most_waiting, self._most_per_tenant = most_waiting, most_waiting_per_tenant
        self._lanes: dict[str, _Lane] = {}
        self._last_counter = 0.0
        """Of the tenant that last had something waiting."""
        self._turns: set[Turn] = set()
        self._begun: dict[Turn, float] = {}
        self._mean_s = 1.0

    def enter(self, tenant: str, weight: float, prompt_tokens: list[int]) -> list[Turn]:
        """Places for answers to prompts of so many tokens: all of them, or QueueFullError."""
        lane = self._lanes.setdefault(tenant, _Lane(weight))
        lane.weight = weight
        count = len(prompt_tokens)
        free = max(0, self.most_running - self.running - self.waiting)
        over = count - free
        if over > 0 and (
            self.waiting + over > self._most_waiting
            or len(lane.waiting) + over > self._most_per_tenant
        ):
            raise QueueFullError(self._wait_s())
        if not lane.waiting:
            self._lift(lane)
        turns = [Turn(self, lane, tokens) for tokens in prompt_tokens]
        lane.waiting.extend(turns)
        self._turns.update(turns)
        self.waiting += count
        self._begin()
        return turns

    def left(self, turn: Turn, lane: _Lane) -> None:
        """`turn` is over; called by `Turn.leave`."""
        if turn not in self._turns:
            return
        self._turns.discard(turn)
        begun = self._begun.pop(turn, None)
        if begun is None:
            lane.waiting.remove(turn)
            self.waiting -= 1
            if not lane.waiting:
                self._last_counter = lane.counter
        else:
            lane.running -= 1
            self.running -= 1
            self._mean_s += 0.1 * (asyncio.get_running_loop().time() - begun - self._mean_s)
        self._begin()

    def waiting_by_tenant(self) -> dict[str, int]:
        """How many answers of each tenant wait."""
        return {name: len(lane.waiting) for name, lane in self._lanes.items()}

    def _lift(self, lane: _Lane) -> None:
        others = [other.counter for other in self._lanes.values() if other.waiting]
        lane.counter = max(lane.counter, min(others) if others else self._last_counter)

    def _begin(self) -> None:
        while self.running < self.most_running and self.waiting:
            lane = min(
                (lane for lane in self._lanes.values() if lane.waiting), key=lambda x: x.counter
            )
            turn = lane.waiting.popleft()
            self.waiting -= 1
            self.running += 1
            lane.running += 1
            lane.counter += PROMPT_COST * turn.prompt_tokens / lane.weight
            if not lane.waiting:
                self._last_counter = lane.counter
            self._begun[turn] = asyncio.get_running_loop().time()
            if not turn.granted.done():
                turn.granted.set_result(None)

    def _wait_s(self) -> float:
        """About how long until there is room: answers leave at `most_running` a mean duration."""
        return min(60.0, max(1.0, self._mean_s * self.waiting / max(1, self.most_running) / 2))
