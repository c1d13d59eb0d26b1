"""Which tokens are which adapter's, where many adapters share a pass.

Each adapter has a slot, and its tokens stand together, in the order of slots: a segment of the
flattened rows, which the kernels of a bank (`kernels/bank.py`) take as it is.

Shape legend as in `pack.py`; G slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor


def is_even(bounds: Sequence[tuple[int, int]]) -> bool:
    """Whether all slots have the same number of tokens."""
    return len({last - first for first, last in bounds}) == 1


@dataclass(frozen=True, slots=True)
class Slots:
    """Of the flattened rows of one pass."""

    ends: Tensor
    """(G,) int32: before which token each slot ends; the last is R * T."""
    bounds: tuple[tuple[int, int], ...]
    """The same on the host: first and last token (exclusive) of each slot."""
    supervised: Tensor
    """(S,) int64: the slot of each supervised target."""

    @classmethod
    def of(cls, counts: Sequence[int], at: Tensor) -> Self:
        """Slots of so many tokens each; `at` (S,) are the supervised places, flattened."""
        ends = list(accumulate(counts))
        bounds = tuple((end - count, end) for end, count in zip(ends, counts, strict=True))
        ends_g = torch.tensor(ends, dtype=torch.int32)
        return cls(ends_g, bounds, torch.bucketize(at, ends_g.long(), right=True))

    def lengthened(self, tokens: int, filling: int) -> Self:
        """For a batch filled up to `tokens`, and by `filling` supervised places: the last slot that
        has tokens takes those behind it."""
        used = self.bounds[-1][1]
        bounds = [
            (tokens if first == used else first, tokens if last == used else last)
            for first, last in self.bounds
        ]
        ends_g = torch.tensor([last for _, last in bounds], dtype=torch.int32)
        supervised = torch.nn.functional.pad(self.supervised, (0, filling))
        return type(self)(ends_g, tuple(bounds), supervised)

    def pinned(self) -> Self:
        """The same in memory that a GPU reads without the host waiting."""
        return replace(self, ends=self.ends.pin_memory(), supervised=self.supervised.pin_memory())

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return replace(self, ends=self.ends.to(device), supervised=self.supervised.to(device))
