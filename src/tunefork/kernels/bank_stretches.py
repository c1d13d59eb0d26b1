"""Many LoRA adapters over one base, on a CPU: each token sums rows of its own adapter, of no other.

Where few tokens decode over many adapters, a product for each adapter is a call for each, and one
product for all is mostly of adapters that are not a token's own. But A x is the rows of A's
transpose weighted by x, and B u those of B's weighted by u: a sum of weighted rows of one table,
each token's own. No number of another adapter is read, and nothing is copied. Where the machine has
a compiler, a kernel does that (`bank_rows.py`); else PyTorch's `embedding_bag`, in one call for all
tokens, whatever their adapters: a group of layers with one input takes two calls and an addition,
and more than a few tokens of one adapter side by side (a prompt) are products of their own.

Decoding SmolLM2-135M, 16 tokens over 8 adapters of rank 16 (2 cores of an EPYC), beside the base:
5 ms a pass by the kernel, 9 without, where padded batched products and a sum for each layer took
20; 128 tokens of a prompt 11 ms and 22.

Shape legend: S tokens, D features in, L layers, O features out (of all layers), N slots, R rank of
a slot, C pieces of a rank, T terms of a piece: R = C T, E = L T. K blocks of W columns: O = K W.
G stretches of M tokens. P, Q sums of A's rows, of B's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunefork.kernels import bank_rows

TERMS = 16
"""T: an adapter's rank is read in pieces of so many, however large its slot is."""
_WIDEST = 640
"""Numbers of a block of B's rows. A sum keeps as many as the processor has registers for, and goes
over rows that are wider once more (16 tokens, O = 3072: 66 us at 192, 99 us at 1536)."""
_FEW = 16
"""Most tokens of a stretch that are summed row by row: each reads its adapter anew."""


class Stretch(NamedTuple):
    """Tokens `first` to `last` (exclusive) belong to `slot`."""

    slot: int
    first: int
    last: int


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
        ends_l = torch.tensor(list(accumulate(sizes)))
        self.kernel = bank_rows.rows_of(self.a_ncde, self.b_ncto, ends_l)
        """None: PyTorch's operations take its place."""
        self.block = _width(math.gcd(*sizes))
        self.rows_a, self.rows_b = self.a_ncde.view(-1, each), self.b_ncto.view(-1, self.block)
        self.shape = (slots, rank, features_in, *sizes)
        ends = list(accumulate(sizes))
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

    @cached_property
    def tokens(self) -> slice:
        """All of them."""
        return slice(self.first, self.first + len(self.slots))

    @cached_property
    def _parts(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each of A's sums, tokens in order: its token, slot and piece."""
        pieces = np.array(self.pieces)
        token_p = np.repeat(np.arange(len(pieces)), pieces)
        piece_p = np.arange(len(token_p)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        return token_p, np.array(self.slots)[token_p], piece_p

    def indices(self, matrices: Matrices) -> _Indices:
        """Made once for all matrices of one shape."""
        found = self.made.get(matrices.shape)
        if found is None:
            found = self.made[matrices.shape] = self._indices(matrices)
        return found

    def _indices(self, matrices: Matrices) -> _Indices:
        token_p, slot_p, piece_p = self._parts
        width, layers = matrices.features_in, len(matrices.sizes)
        where_p = slot_p * (matrices.rank // TERMS) + piece_p
        rows_pd = where_p[:, None] * width + np.arange(width)
        layer_k = np.repeat(np.arange(layers), [size // matrices.block for size in matrices.sizes])
        blocks, term_t = len(layer_k), np.arange(TERMS)
        # y's order is that of tokens, of their blocks; a sum is over an adapter's pieces.
        part_q, block_q = np.divmod(np.arange(len(token_p) * blocks), blocks)
        order_q = np.lexsort((part_q, block_q, token_p[part_q]))
        part_q, block_q = part_q[order_q], block_q[order_q]
        term_qt = (layer_k[block_q] * TERMS)[:, None] + term_t
        terms_qt = part_q[:, None] * layers * TERMS + term_qt
        rows_qt = where_p[part_q][:, None] * TERMS + term_t
        rows_qt = rows_qt * blocks + block_q[:, None]
        lengths = np.repeat(np.array(self.pieces) * TERMS, blocks)
        device = matrices.a_ncde.device
        return _Indices(
            _unless_plain(token_p, len(self.slots), device),
            _numbers(rows_pd, device),
            _numbers(np.arange(len(token_p)) * width, device),
            _unless_plain(terms_qt, len(token_p) * layers * TERMS, device),
            _numbers(rows_qt, device),
            _numbers(np.cumsum(lengths) - lengths, device),
        )


def _width(common: int) -> int:
    """Of the blocks that y is summed in: an even part of every layer, and not wide."""
    while common > _WIDEST and common % 2 == 0:
        common //= 2
    return common


def _numbers(values: NDArray[np.int64], device: torch.device) -> Tensor:
    """int32: there are many, and they are read too."""
    return torch.from_numpy(values.ravel().astype(np.int32)).to(device)


def _unless_plain(values: NDArray[np.int64], count: int, device: torch.device) -> Tensor | None:
    flat = values.ravel()
    is_plain = np.array_equal(flat, np.arange(count))
    return None if is_plain else torch.from_numpy(flat).to(device)


@dataclass(frozen=True, slots=True)
class Batch:
    """Long stretches side by side, of one length and as many pieces: a batched product."""

    first: int
    last: int
    """Exclusive."""
    slots: tuple[int, ...]
    pieces: int

    def of(self, every: Tensor) -> Tensor:
        """The slots' parts of what all slots have, (N, ...)."""
        first, last = self.slots[0], self.slots[-1] + 1
        if self.slots == tuple(range(first, last)):
            return every[first:last]
        return every[list(self.slots)]


@dataclass(frozen=True)
class Layout:
    """Whose the tokens of a pass are. Those in no stretch see the base alone."""

    stretches: tuple[Stretch, ...]
    pieces: tuple[int, ...]

    @cached_property
    def blocks(self) -> bank_rows.Blocks:
        """For the kernel."""
        return bank_rows.Blocks(self.stretches, self.pieces)

    @cached_property
    def runs_and_batches(self) -> tuple[tuple[Run, ...], tuple[Batch, ...]]:
        """For PyTorch's operations: what is summed row by row, what is multiplied."""
        return _cut(self.stretches, self.pieces)


def lay_out(stretches: Sequence[Stretch], ranks: Sequence[int]) -> Layout:
    """`stretches` in the order of their tokens, each with the largest rank of its adapter."""
    return Layout(tuple(stretches), tuple(-(-rank // TERMS) for rank in ranks))


def _cut(
    stretches: Sequence[Stretch], each: Sequence[int]
) -> tuple[tuple[Run, ...], tuple[Batch, ...]]:
    runs: list[Run] = []
    batches: list[Batch] = []
    for (slot, first, last), pieces in zip(stretches, each, strict=True):
        length = last - first
        if length > _FEW:
            batch = Batch(first, last, (slot,), pieces)
            if batches and _is_alike(batches[-1], batch):
                before = batches.pop()
                batch = Batch(before.first, last, (*before.slots, slot), pieces)
            batches.append(batch)
        else:
            run = Run(first, (slot,) * length, (pieces,) * length)
            if runs and runs[-1].tokens.stop == first:
                before_run = runs.pop()
                slots, of_each = before_run.slots + run.slots, before_run.pieces + run.pieces
                run = Run(before_run.first, slots, of_each)
            runs.append(run)
    return tuple(runs), tuple(batches)


def _is_alike(batch: Batch, one: Batch) -> bool:
    length = (batch.last - batch.first) // len(batch.slots)
    is_next = batch.last == one.first
    return is_next and length == one.last - one.first and batch.pieces == one.pieces


def add_stretches(y_so: Tensor, x_sd: Tensor, matrices: Matrices, layout: Layout) -> None:
    """y += B_n A_n x over the tokens of each slot, in place. A row of y lies in one piece."""
    if matrices.kernel is not None:
        matrices.kernel.add(y_so, x_sd, layout.blocks)
    else:
        add_stretches_reference(y_so, x_sd, matrices, layout)


def add_stretches_reference(y_so: Tensor, x_sd: Tensor, matrices: Matrices, layout: Layout) -> None:
    """`add_stretches` by PyTorch's operations, on any device."""
    runs, batches = layout.runs_and_batches
    for batch in batches:
        _add_batch(y_so, x_sd, matrices, batch)
    for run in runs:
        at, x_rd = run.indices(matrices), x_sd[run.tokens]
        if at.tokens_a is not None:
            x_rd = x_rd.index_select(0, at.tokens_a)
        u_p = _sums(matrices.rows_a, at.rows_a, at.starts_a, x_rd.reshape(-1)).view(-1)
        if at.terms_b is not None:
            u_p = u_p.index_select(0, at.terms_b)
        delta_kw = _sums(matrices.rows_b, at.rows_b, at.starts_b, u_p)
        y_so[run.tokens].add_(delta_kw.view(-1, y_so.shape[1]))


def _sums(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Of `table`'s `rows` times `weights`, from each start to the next; summed in fp32."""
    return torch.embedding_bag(table, rows, starts, False, 0, False, weights)[0]


def _add_batch(y_so: Tensor, x_sd: Tensor, matrices: Matrices, batch: Batch) -> None:
    tokens, count = slice(batch.first, batch.last), len(batch.slots)
    x_gmd, y_gmo = (z_sd[tokens].view(count, -1, z_sd.shape[1]) for z_sd in (x_sd, y_so))
    a_gcde, b_gcto = batch.of(matrices.a_ncde), batch.of(matrices.b_ncto)
    for piece in range(batch.pieces):
        u_gme = x_gmd @ a_gcde[:, piece]
        for terms, columns in matrices.parts:
            y_gmo[..., columns].baddbmm_(u_gme[..., terms], b_gcto[:, piece, :, columns])
