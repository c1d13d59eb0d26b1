"""The engine's loop: one pass after the other, until it is told to stop.

All of it runs in one thread; other threads and the event loop only put things into `inbox`. Where
the next pass needs nothing but tokens of the last one, it is launched ahead of them (`ahead.py`).
Else a GPU has nothing to do between the two, and only what the next one depends on is done there:
tokens are taken, who computes next is planned. Texts, deadlines and what `state()` tells wait until
it is launched.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tunefork.errors import AdapterError, NoAdapterMemoryError, NoMemoryError, TuneforkError
from tunefork.serve.engine import EngineState, Piece
from tunefork.serve.engines import telling
from tunefork.serve.engines.ahead import Flight, plan_ahead
from tunefork.serve.engines.cache import Cache
from tunefork.serve.engines.launched import Follows
from tunefork.serve.engines.passes import Passes
from tunefork.serve.engines.scheduler import Planned, Scheduler, is_for
from tunefork.serve.engines.sequence import Sequence as Answer
from tunefork.serve.engines.telling import Event
from tunefork.serve.engines.tier_entry import Entry
from tunefork.serve.engines.tiers import PATIENCE_S, Tiers
from tunefork.serve.engines.trial import NO_MEMORY, ROOM, Trial, launch_with_trial
from tunefork.train.out_of_memory import is_out_of_memory

Parcel = tuple[Any, Piece | TuneforkError]
"""A stream, and what goes into it."""


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
        ahead: bool = False,
    ) -> None:
        """`ahead`: passes may be launched ahead, if they are replayed."""
        self.passes, self.cache, self.tokenizer, self.post = passes, cache, tokenizer, post
        self.overlaps, self.ahead = passes.device.type == "cuda", ahead
        self.inbox: deque[Callable[[], None]] = deque()
        self.is_stopping = False
        self.state = EngineState(healthy=True)
        self._flights: deque[Flight] = deque()
        """Passes under way in their order: one, and perhaps one that was launched ahead."""
        self._parcels: list[Parcel] = []
        self._events: list[Event] = []
        """Of the last pass, where their texts are made while the next one computes."""
        self._something = threading.Condition()
        self.tiers = None if make_tiers is None else make_tiers(self.wake)
        self.scheduler = Scheduler(
            cache, self.tiers, max_requests=max_requests, prefill_tokens=prefill_tokens
        )
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
        self.scheduler.waiting.append(answer)

    def cancel(self, request_id: str) -> None:
        """Nobody wants the answer any more."""
        for answer in list(self.scheduler.open()):
            if answer.request.id == request_id:
                self._end(answer, None)

    @torch.inference_mode()
    def run(self) -> None:
        """Until `is_stopping`. What is raised here is the end of the engine."""
        while True:
            while self.inbox:
                self.inbox.popleft()()
            if self.is_stopping:
                return
            for answer, error in self.scheduler.admit():
                self._end(answer, error)
            planned = [] if self._flights else self.scheduler.plan()
            if planned:
                self._launch(planned)
            self._launch_ahead()
            self._tell()
            self._expire()
            self._publish()
            if self._flights:
                self._events = self._collect()
            elif not planned:
                self._rest()
            if not self.overlaps:
                self._tell()

    def close(self, error: TuneforkError | None) -> None:
        """Give everything back; open requests end with `error`, or as cancelled."""
        while self.inbox:  # a request that came while the last pass failed is open too
            self.inbox.popleft()()
        self._tell()
        self._land()
        for answer in list(self.scheduler.open()):
            cancelled = Piece("", (), finish_reason="cancelled")
            self._end(answer, cancelled if error is None else error)
        self._flush()  # before a dead device has its say
        try:
            if self.tiers is not None:
                self.tiers.close()
        finally:
            self._publish(healthy=False)

    def _rest(self) -> None:
        with self._something:
            if not self.inbox:
                # Deadlines and the tiers' patience need a look from time to time.
                self._something.wait(PATIENCE_S / 2 if self.scheduler.waiting else None)

    def _expire(self) -> None:
        now = time.monotonic()
        for answer in list(self.scheduler.open()):
            deadline = answer.request.deadline
            if deadline is not None and now > deadline:
                self._end(answer, Piece("", (), finish_reason="deadline"))

    def _launch(self, planned: Sequence[Planned]) -> None:
        """The next pass, of which all tokens are known."""
        try:
            self._depart(planned)
        except (RuntimeError, MemoryError) as error:
            self._make_do(planned, error, self.scheduler.to_try())

    def _launch_ahead(self) -> None:
        """The pass behind the one under way, if that is all there is, and if it can do without the
        tokens that come of it."""
        if not self.ahead or not self.passes.has_graphs or len(self._flights) != 1:
            return
        found = plan_ahead(self._flights[0], self.scheduler)
        if found is None:
            return
        try:
            self._depart(*found)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Launched again in its turn, it says whose request fails if there still is no memory.

    def _depart(self, planned: Sequence[Planned], *follows: Follows) -> None:
        parts = [part for _, part in planned]
        tried, trial = self.scheduler.to_try(), None
        if tried is None:
            launched = self.passes.run(parts, *follows)
        else:
            start = self.cache.trial_start
            launched, trial = launch_with_trial(self.passes, parts, follows, tried, start)
            self.scheduler.is_trying()
        self._flights.append(Flight(planned, launched, trial))

    def _collect(self) -> list[Event]:
        """The tokens that the first pass under way chose. Waits for it."""
        flight = self._flights[0]
        try:
            if flight.trial is not None:
                self._conclude(flight.trial)
            answers, by = flight.answers, self.passes.draw_by
            events = telling.read(answers, flight.launched, by) if answers else []
        except (RuntimeError, MemoryError) as error:
            self._make_do(flight.planned, error)
            for lost in self._flights:
                if lost.trial is not None and lost.trial.entry.is_tried:
                    self.scheduler.try_again(lost.trial.entry)
            self._flights.clear()
            return []  # the others compute the same again, and what was ahead of it
        self._flights.popleft()
        for answer, part in flight.planned:
            answer.computed += len(part.ids)
        for event in events:
            if event.finish is not None or event.error is not None:
                self.scheduler.drop(event.answer)
        return events

    def _conclude(self, trial: Trial) -> None:
        """The verdict on an adapter. If it is not to be served, all that ask for it are told."""
        assert self.tiers is not None
        entry, fault = trial.entry, trial.fault()
        self.tiers.load_seconds["trial"] += time.monotonic() - trial.began
        entry.is_tried, entry.is_checked = False, fault is None
        # It may have gone since, and may be on its way anew.
        if fault is not None and self.tiers.entries.get(entry.adapter.id) is entry:
            self._fail(entry, AdapterError(f"{entry.adapter.id}: {fault}; it is not served"))
            self.tiers.drop(entry)

    def _fail(self, entry: Entry, error: TuneforkError) -> None:
        """All requests for an adapter end with `error`."""
        for answer in list(self.scheduler.open()):
            if is_for(answer, entry):
                self._end(answer, error)

    def _land(self) -> None:
        """Tell what passes under way compute: the engine launches no more."""
        try:
            while self._flights:
                self._events = self._collect()
                self._tell()
        except Exception:  # of the device that the engine ended with
            self._flights.clear()

    def _make_do(
        self,
        planned: Sequence[Planned],
        error: RuntimeError | MemoryError,
        tried: Entry | None = None,
    ) -> None:
        """Where memory is short, the request that wants most of it fails alone; or the adapter that
        was `tried`, if no piece of a prompt was longer than that."""
        if not is_out_of_memory(error):
            raise error
        if self.passes.device.type == "cuda":
            torch.cuda.empty_cache()
        answer, part = max(planned, key=lambda one: (len(one[1].ids), one[0].arrived))
        if tried is not None and len(part.ids) <= ROOM:
            self._fail(tried, NoAdapterMemoryError(NO_MEMORY))
            return
        why = (
            "out of memory in a pass; start the server with less embedded.cache_tokens or "
            "embedded.prefill_tokens"
        )
        self._end(answer, NoMemoryError(why))

    def _tell(self) -> None:
        """Texts of chosen tokens, to those who wait for them."""
        events, self._events = self._events, []
        for event in events:
            answer = event.answer
            if answer.is_over:
                continue
            piece = telling.piece_of(event, self.tokenizer)
            if isinstance(piece, Piece) and piece.finish_reason is None:
                self._parcels.append((answer.stream, piece))
            else:
                self._end(answer, piece)
        self._flush()

    def _end(self, answer: Answer, last: Piece | TuneforkError | None) -> None:
        """The request is over, and holds nothing any more."""
        if answer.is_over:
            return
        answer.is_over = True
        self.scheduler.drop(answer)
        if last is not None:
            self._parcels.append((answer.stream, last))

    def _flush(self) -> None:
        if self._parcels:
            parcels, self._parcels = self._parcels, []
            self.post(parcels)

    def _publish(self, *, healthy: bool = True) -> None:
        """What `state()` tells from now on."""
        self._flush()
        of_tiers: dict[str, Any] = {}
        if self.tiers is not None:
            of_tiers = {
                "slots": self.tiers.slots.num_slots,
                "resident": self.tiers.resident,
                "in_host_memory": self.tiers.in_host_memory,
                "loads": self.tiers.loads,
                "evictions": self.tiers.evictions,
                "load_seconds": dict(self.tiers.load_seconds),
            }
        self.state = EngineState(
            healthy=healthy,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            free_cache_tokens=self.cache.regions.free,
            total_cache_tokens=self.cache.total,
            **of_tiers,
        )
