"""A simulated GPU, which computes as late as it may, in the place of a model's passes.

It has one stream: what was launched is computed in that order, when somebody waits for it or when
the dice say so. A second stream copies adapters into slots, at any time after the event it has to
wait for. Keys and values are chained hashes of a request's tokens and its adapter's content, and
the likeliest token, or one that is drawn by a number, is one of the last hash: a region that was
given away too early, or a token that came out of another row or by another number, leads to other
tokens.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Series
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tunefork.kernels.draw import draw
from tunefork.serve.engines.choose import BAD
from tunefork.serve.engines.launched import Follows
from tunefork.serve.engines.layout import BASE, Part
from tunefork.serve.engines.loading import Arrival
from tunefork.serve.engines.regions import Region, Regions
from tunefork.serve.engines.tier_entry import Entry, Stage
from tunefork.serve.engines.trial import ROOM, TRIED

VOCABULARY = 40
SICK = -1
"""Content of an adapter whose logits are not finite."""
_NOTHING = 17
"""What a request's first token follows."""


def after(before: int, token: int, content: int) -> int:
    """The hash at a token."""
    return 0 if content == SICK else hash((before, token, content))


def likeliest(at: int) -> int:
    """Of the logits at that hash; seldom they are not finite."""
    return BAD if at % 499 == 0 else at % 1_000_003 % VOCABULARY


def drawn(at: int, number: float) -> int:
    """Of the logits at that hash, by a number in [0, 1)."""
    return BAD if likeliest(at) == BAD else hash((at, number)) % VOCABULARY


def hash_of(prompt: Series[int], content: int) -> int:
    """Of a whole prompt."""
    found = _NOTHING
    for token in prompt:
        found = after(found, token, content)
    return found


class Device:
    """One stream, a cache and slots."""

    def __init__(self, cache_tokens: int, slots: int, dice: random.Random) -> None:
        self.cache_tokens, self.cache = cache_tokens, [0] * (cache_tokens + ROOM)
        self.slots, self.dice = [0] * slots, dice
        self.fault: Callable[[], None] = lambda: None
        """Is called when a pass is launched or waited for; what it raises is raised there."""
        self.launched = self.done = 0
        self._queue: deque[Callable[[], None]] = deque()

    def launch(self, do: Callable[[], None]) -> int:
        """What `until` calls it."""
        self._queue.append(do)
        self.launched += 1
        if self.dice.random() < 0.3:
            self.until(self.dice.randint(self.done, self.launched))
        return self.launched

    def until(self, number: int) -> None:
        """Compute all that was launched before it, and itself."""
        while self.done < number:
            self._queue.popleft()()
            self.done += 1


class Chosen:
    """Tokens of a pass, once it is computed."""

    def __init__(self, device: Device) -> None:
        self.device, self.number, self.hashes = device, 0, list[int]()
        self.draws = list[float | None]()
        """By which each token is drawn; None: it is the likeliest."""
        self.behind = 0
        """What had been launched behind it when it was waited for."""

    def wait(self) -> list[int]:
        self.device.fault()
        self.behind = self.device.launched - self.number
        self.device.until(self.number)
        return self.tokens

    @property
    def tokens(self) -> list[int]:
        both = zip(self.hashes, self.draws, strict=True)
        return [likeliest(at) if number is None else drawn(at, number) for at, number in both]

    @property
    def logits_rv(self) -> Tensor:
        """They lie where the next pass's will."""
        assert self.device.launched == self.number, "a later pass overwrites these logits"
        self.device.until(self.number)
        rows = []
        for at in self.hashes:
            found = [at * (token + 7) % 9973 / 2000 for token in range(VOCABULARY)]
            best = likeliest(at)
            rows.append([torch.nan] * VOCABULARY if best == BAD else found)
            rows[-1][best] = 5.0 if best != BAD else torch.nan
        return torch.tensor(rows)


class Verdict:
    """In the place of what `trial.verdict_of` gives."""

    def __init__(self, launched: Any) -> None:
        self.chosen: Chosen = launched.arriving
        device = self.chosen.device
        assert device.launched == self.chosen.number, "a later pass overwrites its logits"

    def wait(self) -> list[bool]:
        self.chosen.device.fault()
        self.chosen.device.until(self.chosen.number)
        own, base = self.chosen.hashes[-TRIED:]
        return [likeliest(own) != BAD, own != base]


class Passes:
    """In the place of `passes.Passes`."""

    device = torch.device("cpu")
    graphs = None
    has_graphs = True
    draw_by = staticmethod(draw)

    def __init__(self, gpu: Device) -> None:
        self.gpu, self.num_ahead, self.log = gpu, 0, list[tuple[Chosen, list[Part]]]()
        self.before: Callable[[], None] = lambda: None
        """Is called when a pass is to be launched."""

    def takes_trial(self, tokens: int) -> bool:
        return True

    def run(self, parts: Series[Part], follows: Follows | None = None) -> Any:
        self.before()
        self.gpu.fault()
        chosen, cache = Chosen(self.gpu), self.gpu.cache
        source: Any = None if follows is None else follows.tokens_r
        rows = [] if follows is None else list(follows.rows)

        def compute() -> None:
            for at, part in enumerate(parts):
                ids = part.ids if at >= len(rows) else [max(source.tokens[rows[at]], 0)]
                first = part.start + part.position
                found = cache[first - 1] if part.position else _NOTHING
                content = 0 if part.slot == BASE else self.gpu.slots[part.slot]
                for offset, token in enumerate(ids):
                    found = cache[first + offset] = after(found, token, content)
                if part.wants_logits:
                    chosen.hashes.append(found)
                    chosen.draws.append(None if part.choice is None else part.choice.uniform)

        if follows is not None:
            decoding = parts[: len(rows)]
            assert all(len(part.ids) == 1 for part in decoding)
            neighbours = [slot for slot, _ in groupby(part.slot for part in decoding)]
            assert len(neighbours) == len(set(neighbours)), "rows of one slot lie apart"
            self.num_ahead += 1
        chosen.number = self.gpu.launch(compute)
        self.log.append((chosen, list(parts)))
        return _Launched(chosen)


@dataclass
class _Launched:
    arriving: Chosen

    @property
    def tokens_r(self) -> Chosen:
        return self.arriving

    @property
    def logits_rv(self) -> Tensor:
        return self.arriving.logits_rv


class Cache:
    """In the place of `cache.Cache`."""

    def __init__(self, gpu: Device) -> None:
        self.gpu, self.regions = gpu, Regions(gpu.cache_tokens)
        self.total, self.trial_start = self.regions.total, gpu.cache_tokens

    def move(self, region: Region, target: Region, tokens: int) -> None:
        cache = self.gpu.cache

        def copy() -> None:
            kept = cache[region.start : region.start + tokens]
            cache[target.start : target.start + tokens] = kept

        self.gpu.launch(copy)


class Slots:
    """The second stream."""

    def __init__(self, gpu: Device) -> None:
        self.gpu, self.num_slots, self._emptied = gpu, len(gpu.slots), dict[int, int]()

    def load(self, slot: int, adapter: Any) -> None:
        self.gpu.until(self._emptied.pop(slot, 0))
        self.gpu.slots[slot] = adapter.content

    def clear(self, slot: int) -> None:
        self._emptied[slot] = self.gpu.launched


class Loading:
    """In the place of `loading.Loading`, without threads: steps are done when the dice say so."""

    def __init__(self, slots: Slots, read: Any, **_: Any) -> None:
        self.slots, self.read, self.dice = slots, read, slots.gpu.dice
        self.under_way, self.done = list[Entry](), list[Arrival]()

    def start(self, entry: Entry) -> None:
        self.under_way.append(entry)

    def step(self) -> None:
        for entry in list(self.under_way):
            if self.dice.random() < 0.5:
                self.under_way.remove(entry)
                found = self.read(entry.adapter) if entry.stage is Stage.READING else None
                if found is None:
                    assert entry.slot is not None
                    self.slots.load(entry.slot, entry.host)
                self.done.append((entry, found, 0.0))

    def arrived(self) -> Iterator[Arrival]:
        self.step()
        while self.done:
            yield self.done.pop()

    def close(self) -> None:
        self.under_way.clear()
