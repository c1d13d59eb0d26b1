"""Which part of the key-value cache belongs to which request: one region each, without gaps.

Attention kernels that come with PyTorch read keys and values that lie side by side; not all
versions read pages. So a request's region is one piece, as long as its tokens so far and a bit. It
grows in place where what follows is free, and else moves (`cache.py` copies). Sizes are multiples
of `UNIT` tokens, so that what is left between regions stays of use.
"""

from bisect import insort
from dataclasses import dataclass

UNIT = 64
"""Tokens."""


@dataclass(frozen=True, slots=True)
class Region:
    """Tokens `start` to `start + size` of the cache."""

    start: int
    size: int


class Regions:
    """Hands out regions of a cache of `num_tokens`; first fit, neighbours that are free join."""

    def __init__(self, num_tokens: int, *, reserved: int = UNIT) -> None:
        """The first `reserved` tokens are never handed out."""
        self.total = (num_tokens - reserved) // UNIT * UNIT
        self._free = [(reserved, self.total)]  # (start, size), by start

    @property
    def free(self) -> int:
        """Tokens in no region."""
        return sum(size for _, size in self._free)

    def take(self, tokens: int) -> Region | None:
        """A region of at least `tokens`, or None where no gap is long enough."""
        size = _rounded(tokens)
        for at, (start, length) in enumerate(self._free):
            if length >= size:
                self._cut(at, size)
                return Region(start, size)
        return None

    def grow(self, region: Region, tokens: int) -> Region | None:
        """`region` at least `tokens` long, where it lies; None where what follows is not free."""
        more = _rounded(tokens) - region.size
        if more <= 0:
            return region
        for at, (start, length) in enumerate(self._free):
            if start == region.start + region.size:
                if length < more:
                    return None
                self._cut(at, more)
                return Region(region.start, region.size + more)
        return None

    def give(self, region: Region) -> None:
        """Take `region` back."""
        insort(self._free, (region.start, region.size))
        joined: list[tuple[int, int]] = []
        for start, size in self._free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        self._free = joined

    def _cut(self, at: int, size: int) -> None:
        start, length = self._free[at]
        self._free[at : at + 1] = [(start + size, length - size)] if length > size else []


def _rounded(tokens: int) -> int:
    return -(-tokens // UNIT) * UNIT
