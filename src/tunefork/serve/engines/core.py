"""The engine's loop: who computes next, one pass after the other, until it is told to stop.

A pass holds one token of every request that decodes, and pieces of the prompts of those that begin,
up to a number of tokens: so that a long prompt does not hold up the others. A request begins when
its adapter is in a slot and its tokens have room in the cache, first come, first served among those
that could. Where the cache is full, the request that came last gives its room up and is computed
again later.

All of it runs in one thread; other threads and the event loop only put things into `inbox`. On a
GPU the texts of a pass are made while the next one is computed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunefork.errors import AdapterError, EngineError, TuneforkError
from tunefork.serve.engine import EngineState, FinishReason, Piece, TokenLogprob
from tunefork.serve.engines.cache import Cache
from tunefork.serve.engines.choose import BAD, choose, log_probabilities
from tunefork.serve.engines.passes import BASE, Outcome, Part, Passes
from tunefork.serve.engines.regions import Region
from tunefork.serve.engines.sequence import Sequence as Answer
from tunefork.serve.engines.tiers import PATIENCE_S, Entry, Tiers

_CHECKED = 8
"""Tokens that an adapter is tried on before it is served."""

Parcel = tuple[Any, Piece | TuneforkError]
"""A stream, and what goes into it."""


@dataclass(frozen=True, slots=True)
class _Event:
    """A token that was chosen."""

    answer: Answer
    token: int
    finish: FinishReason | None
    logprob: tuple[float, list[tuple[int, float]]] | None


class Core:
    """Owns the requests. `post` takes parcels to the event loop."""

    def __init__(
        self,
        passes: Passes,
        cache: Cache,
        tokenizer: Any,
        post: Callable[[list[Parcel]], None],
        make_tiers: Callable[[Callable[[], None]], Tiers] | None = None,
        *,
        max_requests: int,
        prefill_tokens: int,
    ) -> None:
        self.passes, self.cache, self.tokenizer, self.post = passes, cache, tokenizer, post
        self.max_requests, self.prefill_tokens = max_requests, prefill_tokens
        self.overlaps = passes.device.type == "cuda"
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        self.inbox: deque[Callable[[], None]] = deque()
        self.is_stopping = False
        self.state = EngineState(healthy=True)
        self._parcels: list[Parcel] = []
        self._something = threading.Condition()
        self.tiers = None if make_tiers is None else make_tiers(self.wake)
        self._publish()

    # Called from any thread

    def tell(self, what: Callable[[], None]) -> None:
        """Have `what` done in the engine's thread, before its next pass."""
        self.inbox.append(what)
        self.wake()

    def wake(self) -> None:
        """There is something to look at."""
        with self._something:
            self._something.notify()

    # The engine's thread

    def end(self) -> None:
        """Stop before the next pass."""
        self.is_stopping = True

    def add(self, answer: Answer) -> None:
        """A new request."""
        self.waiting.append(answer)

    def cancel(self, request_id: str) -> None:
        """Nobody wants the answer any more."""
        for answer in (*self.running, *self.waiting):
            if answer.request.id == request_id:
                self._end(answer, None)

    @torch.inference_mode()
    def run(self) -> None:
        """Until `is_stopping`. What is raised here is the end of the engine."""
        events: list[_Event] = []
        while True:
            while self.inbox:
                self.inbox.popleft()()
            if self.is_stopping:
                return
            self._expire()
            self._admit()
            parts = self._plan()
            launched = self._launch(parts) if parts else None
            if events:
                self._tell(events)
            events = self._collect(parts, launched) if launched else []
            if events and not self.overlaps:
                self._tell(events)
                events = []
            self._publish()
            if not parts and not events:
                self._rest()

    def close(self, error: TuneforkError | None) -> None:
        """Give everything back; open requests end with `error`, or as cancelled."""
        while self.inbox:  # a request that came while the last pass failed is open too
            self.inbox.popleft()()
        for answer in (*self.running, *self.waiting):
            cancelled = Piece("", (), finish_reason="cancelled")
            self._end(answer, cancelled if error is None else error)
        if self.tiers is not None:
            self.tiers.close()
        self._publish(healthy=False)

    def _rest(self) -> None:
        with self._something:
            if not self.inbox:
                # Deadlines and the tiers' patience need a look from time to time.
                self._something.wait(PATIENCE_S / 2 if self.waiting else None)

    def _expire(self) -> None:
        now = time.monotonic()
        for answer in [*self.running, *self.waiting]:
            deadline = answer.request.deadline
            if deadline is not None and now > deadline:
                self._end(answer, Piece("", (), finish_reason="deadline"))

    def _admit(self) -> None:
        """Let waiting requests begin."""
        if self.tiers is not None:
            adapters = (answer.request.adapter for answer in self.waiting)
            self.tiers.advance({adapter.id for adapter in adapters if adapter is not None})
        for answer in list(self.waiting):
            if len(self.running) >= self.max_requests:
                return
            entry: Entry | None = None
            if answer.request.adapter is not None:
                try:
                    entry = self._entry(answer)
                except TuneforkError as error:
                    self._end(answer, error)
                    continue
                if entry is None:
                    continue
            answer.region = self.cache.regions.take(answer.room)
            if answer.region is None:
                return
            if entry is not None and self.tiers is not None:
                answer.slot = self.tiers.enter(entry)
            self.waiting.remove(answer)
            self.running.append(answer)

    def _entry(self, answer: Answer) -> Entry | None:
        """The request's adapter, if it can be computed with. Raises what its load ended with."""
        assert answer.request.adapter is not None
        if self.tiers is None:
            raise EngineError("this engine has no slots for adapters")
        entry = self.tiers.ready(answer.request.adapter)
        if entry is None or entry.is_checked:
            return entry
        region = self.cache.regions.take(2 * _CHECKED)
        if region is None:
            return None  # no room just now
        why = self._check(entry, region)
        self.cache.regions.give(region)
        if why is not None:
            error = AdapterError(f"{entry.adapter.id}: {why}; it is not served")
            self.tiers.fail(entry, error)
            raise error
        entry.is_checked = True
        return entry

    def _check(self, entry: Entry, region: Region) -> str | None:
        """What is wrong with an adapter by what it does to logits: nothing, or not finite ones."""
        assert entry.slot is not None
        ids = [(7 * at + 3) % 64 for at in range(_CHECKED)]
        starts = {entry.slot: region.start, BASE: region.start + _CHECKED}
        parts = [Part(ids, 0, start, slot, wants_logits=True) for slot, start in starts.items()]
        own_v, base_v = self.passes.run(parts).logits_rv
        if not bool(own_v.isfinite().all()):
            return "the logits it gives are not finite"
        return "it changes no logit of this base" if torch.equal(own_v, base_v) else None

    def _plan(self) -> list[tuple[Answer, Part]]:
        """Who computes what in the next pass: decoding rows first, in the order of their slots."""
        planned: list[tuple[Answer, Part]] = []
        decoding = [a for a in self.running if a.computed == len(a.tokens) - 1 and a.computed]
        decoding.sort(key=lambda a: (BASE if a.slot is None else a.slot, len(a.tokens)))
        for answer in decoding:
            if answer in self.running and self._has_room(answer):
                planned.append((answer, _part(answer, 1)))
        # A later one may have given its room up for an earlier one.
        planned = [(answer, part) for answer, part in planned if answer.region is not None]
        left = self.prefill_tokens
        for answer in self.running:
            missing = len(answer.tokens) - answer.computed
            if answer in decoding or left <= 0 or answer.region is None:
                continue
            planned.append((answer, _part(answer, min(missing, left))))
            left -= min(missing, left)
        if self.passes.flash:  # which takes them in any order; adapters' products want this one
            planned.sort(key=lambda one: (one[1].slot == BASE, one[1].slot))
        return planned

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

    def _launch(self, planned: Sequence[tuple[Answer, Part]]) -> Outcome | None:
        """Run the pass. Where memory is short, the request that wants most of it fails alone."""
        try:
            return self.passes.run([part for _, part in planned])
        except (torch.OutOfMemoryError, MemoryError) as error:
            if self.passes.device.type == "cuda":
                torch.cuda.empty_cache()
            answer, _ = max(planned, key=lambda one: (len(one[1].ids), one[0].arrived))
            why = f"no memory for a pass with this request ({type(error).__name__}); ask for less"
            self._end(answer, EngineError(why))
            return None

    def _collect(self, planned: Sequence[tuple[Answer, Part]], outcome: Outcome) -> list[_Event]:
        """The tokens that the pass chose. Waits for it."""
        answers = []
        for answer, part in planned:
            answer.computed += len(part.ids)
            if part.wants_logits:
                answers.append(answer)
        if not answers:
            return []
        choices = [answer.choice() for answer in answers]
        if all(choice.is_greedy for choice in choices):
            tokens = outcome.tokens_r[: len(answers)].tolist()
        else:
            tokens = choose(outcome.logits_rv, choices).tolist()
        told = self._logprobs(answers, tokens, outcome)
        events = []
        for row, (answer, token) in enumerate(zip(answers, tokens, strict=True)):
            if token == BAD:
                self._end(answer, EngineError("the model's logits are not finite (NaN)"))
                continue
            finish = answer.take(token)
            if finish is not None:
                self._retire(answer)
            events.append(_Event(answer, token, finish, told.get(row)))
        return events

    def _logprobs(
        self, answers: Sequence[Answer], tokens: Sequence[int], outcome: Outcome
    ) -> dict[int, tuple[float, list[tuple[int, float]]]]:
        """By row, for those that asked."""
        asked = {
            row: answer.request.sampling.logprobs
            for row, answer in enumerate(answers)
            if answer.request.sampling.logprobs is not None and tokens[row] != BAD
        }
        if not asked:
            return {}
        rows = torch.tensor(list(asked), device=outcome.logits_rv.device)
        most = max(number for number in asked.values() if number is not None)
        logits_rv = outcome.logits_rv.index_select(0, rows)
        found = log_probabilities(logits_rv, [tokens[row] for row in asked], most)
        return {
            row: (own, top[:number])
            for (row, number), (own, top) in zip(asked.items(), found, strict=True)
        }

    def _tell(self, events: Sequence[_Event]) -> None:
        """Texts of chosen tokens, to those who wait for them."""
        for event in events:
            answer, finish = event.answer, event.finish
            if answer.is_over:
                continue
            is_stop_id = finish == "stop" and event.token in answer.request.sampling.stop_ids
            text = "" if is_stop_id else answer.detokenizer.push([event.token])
            if answer.detokenizer.stopped:
                finish = "stop"
            elif finish is not None:
                text += answer.detokenizer.flush()
            logprobs = () if event.logprob is None or is_stop_id else (self._spell(event),)
            piece = Piece(text, (event.token,), logprobs, finish)
            if finish is None:
                self._parcels.append((answer.stream, piece))
            else:
                self._end(answer, piece)
        self._flush()

    def _spell(self, event: _Event) -> TokenLogprob:
        assert event.logprob is not None
        own, top = event.logprob
        return TokenLogprob(
            event.token,
            self.tokenizer.decode([event.token]),
            own,
            tuple((token, self.tokenizer.decode([token]), value) for token, value in top),
        )

    def _retire(self, answer: Answer) -> None:
        """It computes no more; its last piece is still to be told."""
        if answer in self.running:
            self.running.remove(answer)
        self._let_go(answer)

    def _end(self, answer: Answer, last: Piece | TuneforkError | None) -> None:
        """The request is over, and holds nothing any more."""
        if answer.is_over:
            return
        answer.is_over = True
        if answer in self.waiting:
            self.waiting.remove(answer)
        self._retire(answer)
        if last is not None:
            self._parcels.append((answer.stream, last))

    def _let_go(self, answer: Answer) -> None:
        if answer.region is not None:
            self.cache.regions.give(answer.region)
            answer.region = None
        if answer.slot is not None and self.tiers is not None:
            assert answer.request.adapter is not None
            self.tiers.leave(answer.request.adapter.id)
            answer.slot = None

    def _flush(self) -> None:
        if self._parcels:
            parcels, self._parcels = self._parcels, []
            self.post(parcels)

    def _publish(self, *, healthy: bool = True) -> None:
        """What `state()` tells from now on."""
        self._flush()
        state = EngineState(
            healthy=healthy,
            running=len(self.running),
            waiting=len(self.waiting),
            free_cache_tokens=self.cache.regions.free,
            total_cache_tokens=self.cache.total,
        )
        if self.tiers is not None:
            state = replace(
                state,
                slots=self.tiers.slots.num_slots,
                resident=self.tiers.resident,
                in_host_memory=self.tiers.in_host_memory,
                loads=self.tiers.loads,
                evictions=self.tiers.evictions,
                load_seconds=self.tiers.load_seconds,
            )
        self.state = state


def _part(answer: Answer, new: int) -> Part:
    assert answer.region is not None
    end = answer.computed + new
    return Part(
        answer.tokens[answer.computed : end],
        answer.computed,
        answer.region.start,
        BASE if answer.slot is None else answer.slot,
        wants_logits=end == len(answer.tokens),
    )
