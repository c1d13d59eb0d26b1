"""A and B of many LoRA adapters, as `bank_stretches.py` and `bank_rows.py` read them on a CPU.

Shape legend: D features in, L layers, O features out (of all layers), N slots, R rank of a slot, C
pieces of a rank, T terms of a piece: R = C T, E = L T. K blocks of W columns: O = K W.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from tunefork.kernels import bank_rows

TERMS = 16
"""T: an adapter's rank is read in pieces of so many, however large its slot is."""
_WIDEST = 640
"""Numbers of a block of B's rows. A sum keeps as many as the processor has registers for, and goes
over rows that are wider once more (16 tokens, O = 3072: 66 us at 192, 99 us at 1536)."""


class Matrices:
    """A and B of all slots, of layers that are given the same input. Slots start empty: zeros."""

    def __init__(
        self,
        slots: int,
        rank: int,
        features_in: int,
        sizes: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        """`rank` of a slot, a multiple of `TERMS`; `sizes`: features out of each layer."""
        self.rank, self.features_in, self.sizes = rank, features_in, tuple(sizes)
        pieces, each = rank // TERMS, len(sizes) * TERMS
        self.a_ncde = torch.zeros(slots, pieces, features_in, each, dtype=dtype, device=device)
        """A transposed, times its scale, of all layers side by side."""
        self.b_ncto = torch.zeros(slots, pieces, TERMS, sum(sizes), dtype=dtype, device=device)
        """B transposed, of all layers side by side."""
        ends = list(accumulate(sizes))
        self.kernel = bank_rows.rows_of(self.a_ncde, self.b_ncto, torch.tensor(ends))
        """None: PyTorch's operations take its place."""
        self.block = _width(math.gcd(*sizes))
        self.rows_a, self.rows_b = self.a_ncde.view(-1, each), self.b_ncto.view(-1, self.block)
        self.shape = (slots, rank, features_in, *sizes)
        self.parts = [
            (slice(layer * TERMS, (layer + 1) * TERMS), slice(end - size, end))
            for layer, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]
        """Of each layer: its part of u, and of y."""

    def write(self, layer: int, slot: int, a_rd: Tensor | None, b_ro: Tensor | None) -> None:
        """A and B transposed of a slot's rank or less; None: nothing. Others may be read."""
        for own, given in zip(self._views(layer, slot), (a_rd, b_ro), strict=True):
            padded = own.new_zeros(self.rank, own.shape[-1])
            if given is not None:
                padded[: given.shape[0]] = given
            own.copy_(padded.view(own.shape))

    def read(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """A (R, D) and B transposed (R, O_i); maybe copies."""
        a_ctd, b_cto = self._views(layer, slot)
        return a_ctd.flatten(0, 1), b_cto.flatten(0, 1)

    def _views(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """(C, T, D) and (C, T, O_i)."""
        terms, columns = self.parts[layer]
        return self.a_ncde[slot, :, :, terms].transpose(1, 2), self.b_ncto[slot, :, :, columns]


def _width(common: int) -> int:
    """Of the blocks that y is summed in: an even part of every layer, and not wide."""
    while common > _WIDEST and common % 2 == 0:
        common //= 2
    return common
