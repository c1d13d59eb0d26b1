"""Who computes in the next pass: who waits, who runs, and what each of them holds.

A pass holds one token of every request that decodes, and pieces of the prompts of those that begin,
up to a number of tokens: so that a long prompt does not hold up the others. A request begins when
its adapter is in a slot and its tokens have room in the cache, first come, first served among those
that could. Where the cache is full, the request that came last gives its room up and is computed
again later. The first request for an adapter has the next pass try it (`trial.py`), one adapter a
pass.
"""

from collections import deque
from collections.abc import Iterable, Iterator

from tunefork.errors import EngineError, TuneforkError
from tunefork.serve.engine import ServedAdapter
from tunefork.serve.engines.cache import Cache
from tunefork.serve.engines.layout import BASE, Part
from tunefork.serve.engines.sequence import Sequence as Answer
from tunefork.serve.engines.tier_entry import Entry
from tunefork.serve.engines.tiers import Tiers
from tunefork.serve.engines.trial import ROOM

Planned = tuple[Answer, Part]


class Scheduler:
    """Engine thread only."""

    def __init__(
        self,
        cache: Cache,
        tiers: Tiers | None,
        *,
        max_requests: int,
        prefill_tokens: int,
    ) -> None:
        self.cache, self.tiers = cache, tiers
        self.max_requests, self.prefill_tokens = max_requests, prefill_tokens
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        self._to_try: Entry | None = None

    def open(self) -> Iterator[Answer]:
        """All requests; they may be dropped meanwhile."""
        yield from (*self.running, *self.waiting)

    def drop(self, answer: Answer) -> None:
        """It computes no more, and holds nothing."""
        if answer in self.waiting:
            self.waiting.remove(answer)
        if answer in self.running:
            self.running.remove(answer)
        self._let_go(answer)

    def admit(self) -> list[tuple[Answer, TuneforkError]]:
        """Let waiting requests begin. Returns those that never will, and why."""
        failures: dict[str, TuneforkError] = {}
        """By adapter: why its requests fail, all that wait at the same time."""
        if self.tiers is not None:
            adapters = (answer.request.adapter for answer in self.waiting)
            failures = self.tiers.advance({one.id for one in adapters if one is not None})
        self.to_try()  # nobody may want it any more, and its slot may go
        failed: list[tuple[Answer, TuneforkError]] = []
        is_full = False
        for answer in list(self.waiting):
            adapter = answer.request.adapter
            if adapter is not None and adapter.id in failures:
                failed.append((answer, failures[adapter.id]))
                continue
            is_full = is_full or len(self.running) >= self.max_requests
            if is_full:
                continue
            try:
                entry = None if adapter is None else self._entry(adapter)
            except TuneforkError as error:
                assert adapter is not None
                failures[adapter.id] = error
                failed.append((answer, error))
                continue
            if adapter is None or entry is not None:
                is_full = not self._begin(answer, entry)
        return failed

    def _begin(self, answer: Answer, entry: Entry | None) -> bool:
        """Let a request run, if its tokens have room in the cache."""
        answer.region = self.cache.regions.take(answer.room)
        if answer.region is None:
            return False
        if entry is not None and self.tiers is not None:
            answer.slot = self.tiers.enter(entry)
            if not (entry.is_checked or entry.is_tried):
                entry.is_tried, self._to_try = True, entry
        self.waiting.remove(answer)
        self.running.append(answer)
        return True

    def to_try(self) -> Entry | None:
        """The adapter that the next pass tries; called off where no request has begun with it."""
        entry = self._to_try
        if entry is not None and not entry.users:
            entry.is_tried, self._to_try = False, None
        return self._to_try

    def is_trying(self) -> None:
        """The pass with that trial is launched."""
        self._to_try = None

    def try_again(self, entry: Entry) -> None:
        """The pass that tried it is lost: its requests begin anew, with another one."""
        entry.is_tried = False
        for answer in [one for one in self.running if is_for(one, entry)][::-1]:
            self._put_back(answer)

    def plan(self) -> list[Planned]:
        """Who computes what in the next pass: decoding rows first, in the order of their slots."""
        decoding = [answer for answer in self.running if answer.decodes]
        decoding.sort(key=by_slot)
        ready = [answer for answer in decoding if answer.region and self._has_room(answer)]
        # A later one may have given its room up for an earlier one.
        planned = [
            (answer, part_of(answer, answer.computed, 1)) for answer in ready if answer.region
        ]
        prompts = [(answer, answer.computed) for answer in self.running if not answer.decodes]
        return planned + self.pieces(prompts)

    def pieces(self, prompts: Iterable[tuple[Answer, int]]) -> list[Planned]:
        """As much of prompts as a pass takes; of each, so many tokens are computed by then."""
        planned: list[Planned] = []
        left = self.prefill_tokens
        if self._to_try is not None:
            left = max(left - ROOM, 1)
        for answer, computed in prompts:
            new = min(len(answer.tokens) - computed, left)
            if new > 0:
                planned.append((answer, part_of(answer, computed, new)))
                left -= new
        return planned

    def _entry(self, adapter: ServedAdapter) -> Entry | None:
        """The adapter, if it can be computed with. Raises TuneforkError where it is of no use."""
        if self.tiers is None:
            raise EngineError("this engine has no slots for adapters")
        entry = self.tiers.ready(adapter)
        if entry is None or entry.is_checked or entry.is_tried:
            return entry
        return entry if self._to_try is None else None

    def _has_room(self, answer: Answer) -> bool:
        """Whether its next token has room in the cache, made if need be."""
        assert answer.region is not None
        regions = self.cache.regions
        while len(answer.tokens) > answer.region.size:
            grown = regions.grow(answer.region, len(answer.tokens))
            if grown is None:
                grown = regions.take(answer.room)
                if grown is not None:
                    self.cache.move(answer.region, grown, answer.computed)
                    regions.give(answer.region)
            if grown is not None:
                answer.region = grown
                return True
            last = self.running[-1]
            self._put_back(last)
            if last is answer:
                return False
        return True

    def _put_back(self, answer: Answer) -> None:
        """To the head of those that wait, without what it held."""
        self.running.remove(answer)
        self._let_go(answer)
        answer.computed = 0
        self.waiting.appendleft(answer)

    def _let_go(self, answer: Answer) -> None:
        if answer.region is not None:
            self.cache.regions.give(answer.region)
            answer.region = None
        if answer.slot is not None and self.tiers is not None:
            assert answer.request.adapter is not None
            self.tiers.leave(answer.request.adapter.id)
            answer.slot = None


def is_for(answer: Answer, entry: Entry) -> bool:
    """It is asked of that adapter."""
    adapter = answer.request.adapter
    return adapter is not None and adapter.id == entry.adapter.id


def by_slot(answer: Answer) -> tuple[bool, int, int]:
    """Decoding rows come in this order."""
    return answer.slot is None, answer.slot or 0, len(answer.tokens)


def part_of(answer: Answer, computed: int, new: int, behind: int = 0) -> Part:
    """Of a pass: `new` tokens of `answer` behind those that are computed by then. What follows them
    is its next token, or the one so many `behind` it."""
    assert answer.region is not None
    end = computed + new
    wants_logits = end == len(answer.tokens)
    return Part(
        answer.tokens[computed:end],
        computed,
        answer.region.start,
        BASE if answer.slot is None else answer.slot,
        wants_logits,
        answer.choice_of_pass(behind) if wants_logits else None,
    )
