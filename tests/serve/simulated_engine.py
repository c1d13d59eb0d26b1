"""An engine's loop over a simulated GPU (`lazy_device.py`), and all that its requests were told.

Everything happens in one thread. Time is counted in passes that were launched.
"""

import random
from collections.abc import Callable
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.serve.lazy_device import SICK, Cache, Device, Passes, Slots
from tunefork.errors import TuneforkError
from tunefork.serve.engine import EngineRequest, Piece, ServedAdapter
from tunefork.serve.engines.core import Core, Parcel
from tunefork.serve.engines.sequence import Sequence, open_sequence
from tunefork.serve.engines.tiers import Tiers


class _Tokenizer:
    """A letter a token."""

    def __init__(self) -> None:
        self.backend_tokenizer = self

    def decode(self, ids: Series[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(97 + token % 26) for token in ids)


@dataclass
class Told:
    """All that one request was told."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    end: str | None = None

    def put(self, item: Piece | TuneforkError) -> None:
        assert self.end is None, "something came after the end"
        if not isinstance(item, Piece):
            self.end = type(item).__name__
            return
        self.tokens += item.token_ids
        self.text += item.text
        self.end = item.finish_reason


class Simulation:
    """One engine's life. `events` are (when, what is done in the engine's thread)."""

    def __init__(
        self,
        seed: int,
        *,
        ahead: bool,
        clock: SimpleNamespace,
        cache_tokens: int = 64 * 9,
        slots: int = 2,
        max_requests: int = 6,
    ) -> None:
        """`clock` is `core.time`."""
        self.now, self.events = 0.0, list[tuple[float, Callable[[], None]]]()
        clock.monotonic = lambda: self.now
        self.gpu = Device(cache_tokens, slots, random.Random(seed))
        self.passes, self.told = Passes(self.gpu), dict[str, Told]()
        self._answers: list[Sequence] = []
        self.passes.before = self._tick
        passes: Any = self.passes
        cache: Any = Cache(self.gpu)
        self.core = Core(
            passes,
            cache,
            _Tokenizer(),
            self._post,
            self._tiers,
            max_requests=max_requests,
            prefill_tokens=24,
            ahead=ahead,
        )
        self.core.overlaps = True
        self.core._rest = self._rest  # type: ignore[method-assign]

    def add(self, request: EngineRequest, matcher: Any = None) -> None:
        told = self.told[request.id] = Told()
        answer = open_sequence(request, told, self.now, self.core.tokenizer, matcher)
        self._answers.append(answer)
        self.core.add(answer)

    def run(self) -> None:
        """Until all events were and nobody is open; or what the engine ends with is raised."""
        self.events.sort(key=lambda event: event[0])
        self.core.run()

    def close(self, error: TuneforkError | None = None) -> None:
        """Nothing is held any more then, and every request was told its end."""
        scheduler, tiers = self.core.scheduler, self.core.tiers
        assert tiers is not None
        held = dict(tiers.entries)
        self.core.close(error)
        assert not scheduler.running and not scheduler.waiting and not self.core._flights
        assert scheduler.cache.regions.free == scheduler.cache.total
        assert not any(entry.users for entry in held.values())
        for answer in self._answers:
            told = answer.stream
            assert told.end is not None
            if told.end in ("stop", "length"):  # a token that was computed in vain is none of it
                assert answer.num_answered == len(told.tokens)

    def _post(self, parcels: list[Parcel]) -> None:
        for told, item in parcels:
            told.put(item)

    def _tiers(self, wake: Callable[[], None]) -> Tiers:
        slots: Any = Slots(self.gpu)

        def read(adapter: ServedAdapter) -> Any:
            return SimpleNamespace(num_bytes=10, rank=4, content=content_of(adapter))

        return Tiers(
            slots, read, host_memory_bytes=25, wake=wake, clock=lambda: 0.02 * self.now, begin=None
        )

    def _tick(self) -> None:
        self.now += 1
        assert self.now < 20_000, "somebody waits for ever"
        while self.events and self.events[0][0] <= self.now:
            self.core.tell(self.events.pop(0)[1])
        tiers: Any = self.core.tiers
        if self.gpu.dice.random() < 0.5:
            tiers.loading.step()

    def _rest(self) -> None:
        """Nothing to compute: time goes on."""
        self._tick()
        if not self.events and not self.core.inbox and not list(self.core.scheduler.open()):
            self.core.tell(self.core.end)


ADAPTERS = [ServedAdapter(f"{at}:v1", Path(), rank=4, bytes=10) for at in range(4)]
DEAD, ILL = (ServedAdapter(f"{name}:v1", Path(), rank=4, bytes=10) for name in ("dead", "ill"))
"""They change nothing, and all to what is not finite."""


def content_of(adapter: ServedAdapter | None) -> int:
    """What a slot holds of it."""
    if adapter == ILL:
        return SICK
    return 0 if adapter in (None, DEAD) else 1 + ADAPTERS.index(adapter)
