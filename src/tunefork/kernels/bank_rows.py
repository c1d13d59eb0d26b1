"""Many LoRA adapters over one base, on a CPU: each token sums rows of its own adapter, of no other.

Where few tokens decode over many adapters, a product for each adapter is a call for each, and one
product for all is mostly of adapters that are not a token's own. But A x is the rows of A's
transpose weighted by x, and B u those of B's weighted by u: a sum of weighted rows of one table,
each token's own, which is what PyTorch's `embedding_bag` computes in one call for all tokens,
whatever their adapters. So a group of layers with one input takes two calls and an addition, no
number of another adapter is read, and nothing is copied.

Decoding SmolLM2-135M, 16 tokens over 8 adapters of rank 16 (2 cores of an EPYC): 9 ms a pass, where
padded batched products and a sum for each layer took 20.

More than a few tokens of one adapter side by side (a prompt) are products of their own.

Shape legend: S tokens, D features in, L layers, O features out (of all layers), N slots, R rank of
a slot, C pieces of a rank, T terms of a piece: R = C T. K blocks of columns, of W: O = K W.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunefork.kernels.bank_stretches import Stretch

TERMS = 16
"""T: an adapter's rank is read in pieces of so many, however large its slot is."""
_FEW = 8
"""Most tokens of a stretch that are summed row by row: each reads its adapter anew."""


class Matrices:
    """A and B of all slots, of layers that are given the same input. Slots start empty: zeros."""

    def __init__(
        self, slots: int, rank: int, features_in: int, sizes: Sequence[int], dtype: torch.dtype
    ) -> None:
        """`rank` of a slot, a multiple of `TERMS`; `sizes`: features out of each layer."""
        self.slots, self.rank, self.features_in = slots, rank, features_in
        self.sizes, pieces = tuple(sizes), rank // TERMS
        self.a_ncde = torch.zeros(slots, pieces, features_in, len(sizes) * TERMS, dtype=dtype)
        """A transposed, in pieces of its rank: (N, C, D, L T)."""
        self.b_nro = torch.zeros(slots, rank, sum(sizes), dtype=dtype)
        """B transposed, of all layers side by side. Both carry no scale but A's."""
        self.block = math.gcd(*sizes)
        self.rows_a = self.a_ncde.view(-1, len(sizes) * TERMS)
        self.rows_b = self.b_nro.view(-1, self.block)
        ends = np.cumsum(sizes).tolist()
        self.columns = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def write(self, layer: int, slot: int, a_rd: Tensor | None, b_ro: Tensor | None) -> None:
        """A and B transposed of a slot's rank or less; None: nothing. Others may be read."""
        for own, given in zip(self._views(layer, slot), (a_rd, b_ro), strict=True):
            padded = own.new_zeros(self.rank, own.shape[-1])
            if given is not None:
                padded[: given.shape[0]] = given
            own.copy_(padded.view(own.shape))

    def read(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """A (R, D) and B transposed (R, O_i); maybe copies."""
        a_ctd, b_ro = self._views(layer, slot)
        return a_ctd.flatten(0, 1), b_ro

    def _views(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        a_cdt = self.a_ncde[slot, :, :, layer * TERMS : (layer + 1) * TERMS]
        return a_cdt.transpose(1, 2), self.b_nro[slot, :, self.columns[layer]]


@dataclass(frozen=True, slots=True)
class _Indices:
    """Which rows a run's sums are of, for matrices of one shape."""

    tokens_a: Tensor | None
    """The token of each of A's sums; None: one each, in order."""
    rows_a: Tensor
    starts_a: Tensor
    terms_b: Tensor | None
    """Which numbers of u are B's weights; None: all, in order."""
    rows_b: Tensor
    starts_b: Tensor


@dataclass(frozen=True)
class Run:
    """Tokens from `first` on, side by side: the slot of each, and how many pieces it has."""

    first: int
    slots: tuple[int, ...]
    pieces: tuple[int, ...]
    made: dict[tuple[int, ...], _Indices] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """Exclusive."""
        return self.first + len(self.slots)

    @cached_property
    def _parts(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each of A's sums, tokens in order: its token, slot and piece."""
        pieces = np.array(self.pieces)
        token_p = np.repeat(np.arange(len(pieces)), pieces)
        piece_p = np.arange(len(token_p)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        return token_p, np.array(self.slots)[token_p], piece_p

    def indices(self, matrices: Matrices) -> _Indices:
        """Made once for all matrices of one shape."""
        key = (matrices.features_in, matrices.rank, *matrices.sizes)
        if key not in self.made:
            self.made[key] = self._indices(matrices)
        return self.made[key]

    def _indices(self, matrices: Matrices) -> _Indices:
        token_p, slot_p, piece_p = self._parts
        width, layers = matrices.features_in, len(matrices.sizes)
        rows_pd = (slot_p * (matrices.rank // TERMS) + piece_p)[:, None] * width + np.arange(width)
        layer_k = np.repeat(np.arange(layers), [size // matrices.block for size in matrices.sizes])
        blocks, term_t = len(layer_k), np.arange(TERMS)
        # y's order is that of tokens, of their blocks; a sum is over an adapter's pieces.
        part_q, block_q = np.divmod(np.arange(len(token_p) * blocks), blocks)
        order_q = np.lexsort((part_q, block_q, token_p[part_q]))
        part_q, block_q = part_q[order_q], block_q[order_q]
        terms_qt = ((part_q * layers + layer_k[block_q]) * TERMS)[:, None] + term_t
        rank_q = slot_p[part_q] * matrices.rank + piece_p[part_q] * TERMS
        rows_qt = (rank_q[:, None] + term_t) * blocks + block_q[:, None]
        lengths = np.repeat(np.array(self.pieces) * TERMS, blocks)
        return _Indices(
            _unless_plain(token_p, len(self.slots)),
            _numbers(rows_pd),
            _numbers(np.arange(len(token_p)) * width),
            _unless_plain(terms_qt.ravel(), len(token_p) * layers * TERMS),
            _numbers(rows_qt),
            _numbers(np.cumsum(lengths) - lengths),
        )


def _numbers(values: NDArray[np.int64]) -> Tensor:
    """int32: there are many, and they are read too."""
    return torch.from_numpy(values.ravel().astype(np.int32))


def _unless_plain(values: NDArray[np.int64], count: int) -> Tensor | None:
    return None if np.array_equal(values, np.arange(count)) else torch.from_numpy(values)


@dataclass(frozen=True, slots=True)
class Layout:
    """Whose the tokens of a pass are. Those in no stretch see the base alone."""

    runs: tuple[Run, ...]
    long: tuple[tuple[Stretch, int], ...]
    """With the number of its adapter's pieces."""


def lay_out(stretches: Sequence[Stretch], ranks: Sequence[int]) -> Layout:
    """`stretches` in the order of their tokens, each with the largest rank of its adapter."""
    runs: list[tuple[int, list[int], list[int]]] = []
    long, last = [], -1
    for stretch, rank in zip(stretches, ranks, strict=True):
        pieces, length = -(-rank // TERMS), stretch.last - stretch.first
        if length > _FEW:
            long.append((stretch, pieces))
            continue
        if stretch.first != last:
            runs.append((stretch.first, [], []))
        last = stretch.last
        runs[-1][1].extend([stretch.slot] * length)
        runs[-1][2].extend([pieces] * length)
    found = tuple(Run(first, tuple(slots), tuple(pieces)) for first, slots, pieces in runs)
    return Layout(found, tuple(long))


def add_rows(y_so: Tensor, x_sd: Tensor, matrices: Matrices, layout: Layout) -> None:
    """y += B_n A_n x over the tokens of each slot, in place."""
    for stretch, pieces in layout.long:
        _add_long(y_so, x_sd, matrices, stretch, pieces)
    for run in layout.runs:
        at, x_rd = run.indices(matrices), x_sd[run.first : run.last]
        if at.tokens_a is not None:
            x_rd = x_rd.index_select(0, at.tokens_a)
        u_pe = _sums(matrices.rows_a, at.rows_a, at.starts_a, x_rd)
        if at.terms_b is not None:
            u_pe = u_pe.view(-1).index_select(0, at.terms_b)
        delta_kw = _sums(matrices.rows_b, at.rows_b, at.starts_b, u_pe)
        y_so[run.first : run.last] += delta_kw.view(-1, y_so.shape[1])


def _sums(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Of `table`'s `rows` times `weights`, from each start to the next; summed in fp32."""
    return torch.embedding_bag(table, rows, starts, mode=0, per_sample_weights=weights.reshape(-1))[
        0
    ]


def _add_long(
    y_so: Tensor, x_sd: Tensor, matrices: Matrices, stretch: Stretch, pieces: int
) -> None:
    slot, first, last = stretch
    layers = len(matrices.sizes)
    u_cse = x_sd[first:last] @ matrices.a_ncde[slot, :pieces]
    u_lsr = u_cse.view(pieces, -1, layers, TERMS).permute(2, 1, 0, 3).flatten(2)
    b_ro = matrices.b_nro[slot, : pieces * TERMS]
    for u_sr, columns in zip(u_lsr.unbind(), matrices.columns, strict=True):
        y_so[first:last, columns].addmm_(u_sr, b_ro[:, columns])
