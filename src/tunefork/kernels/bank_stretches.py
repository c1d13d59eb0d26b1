"""Many LoRA adapters over one base, on a CPU: each token sums rows of its own adapter, of no other.

Where few tokens decode over many adapters, a product for each adapter is a call for each, and one
product for all is mostly of adapters that are not a token's own. But A x is the rows of A's
transpose weighted by x, and B u those of B's weighted by u: a sum of weighted rows of one table,
each token's own. No number of another adapter is read, and nothing is copied. Where the machine has
a compiler and AVX-512, a kernel does that (`bank_rows.py`); else PyTorch's `embedding_bag`, in one
call for all tokens, whatever their adapters: a group of layers with one input takes two calls and
an addition. Many tokens of one adapter side by side (a prompt) are products of their own.

Decoding SmolLM2-135M, 16 tokens over 8 adapters of rank 16 (2 cores of an EPYC), beside the base:
5 ms a pass by the kernel, 9 without, where padded batched products and a sum for each layer took
20; 128 tokens of a prompt 11 ms and 22.

Shape legend: S tokens, D features in, L layers, O features out (of all layers), N slots, R rank of
a slot, C pieces of a rank, T terms of a piece: R = C T, E = L T. K blocks of W columns: O = K W.
G stretches of M tokens. P, Q sums of A's rows, of B's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunefork.kernels import bank_rows
from tunefork.kernels.bank_tables import TERMS, Matrices

_FEW = 16
"""Most tokens of a stretch that are summed row by row: each reads its adapter anew."""


class Stretch(NamedTuple):
    """Tokens `first` to `last` (exclusive) belong to `slot`."""

    slot: int
    first: int
    last: int


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
    made: dict[int, tuple[bank_rows.Blocks, list[Batch]]] = field(default_factory=dict)

    def blocks(self, most: int) -> tuple[bank_rows.Blocks, list[Batch]]:
        """For the kernel, and what has more than `most` tokens side by side. Made once."""
        if most not in self.made:
            short, pieces, batches = _divide(self.stretches, self.pieces, most)
            self.made[most] = bank_rows.Blocks(short, pieces), batches
        return self.made[most]

    @cached_property
    def runs(self) -> tuple[list[Run], list[Batch]]:
        """For PyTorch's operations: what is summed row by row, and longer stretches."""
        short, each, batches = _divide(self.stretches, self.pieces, _FEW)
        runs: list[Run] = []
        for (slot, first, last), pieces in zip(short, each, strict=True):
            run = Run(first, (slot,) * (last - first), (pieces,) * (last - first))
            if runs and runs[-1].tokens.stop == first:
                before = runs.pop()
                run = Run(before.first, before.slots + run.slots, before.pieces + run.pieces)
            runs.append(run)
        return runs, batches


def lay_out(stretches: Sequence[Stretch], ranks: Sequence[int]) -> Layout:
    """`stretches` in the order of their tokens, each with the largest rank of its adapter."""
    return Layout(tuple(stretches), tuple(-(-rank // TERMS) for rank in ranks))


def _divide(
    stretches: Sequence[Stretch], each: Sequence[int], most: int
) -> tuple[list[Stretch], list[int], list[Batch]]:
    """Stretches of up to `most` tokens with their pieces, and the others in batches."""
    short: list[Stretch] = []
    its_pieces: list[int] = []
    batches: list[Batch] = []
    for stretch, pieces in zip(stretches, each, strict=True):
        slot, first, last = stretch
        if last - first <= most:
            short.append(stretch)
            its_pieces.append(pieces)
            continue
        batch = Batch(first, last, (slot,), pieces)
        if batches and _is_alike(batches[-1], batch):
            before = batches.pop()
            batch = Batch(before.first, last, (*before.slots, slot), pieces)
        batches.append(batch)
    return short, its_pieces, batches


def _is_alike(batch: Batch, one: Batch) -> bool:
    length = (batch.last - batch.first) // len(batch.slots)
    is_next = batch.last == one.first
    return is_next and length == one.last - one.first and batch.pieces == one.pieces


def add_stretches(y_so: Tensor, x_sd: Tensor, matrices: Matrices, layout: Layout) -> None:
    """y += B_n A_n x over the tokens of each slot, in place. A row of y lies in one piece."""
    kernel = matrices.kernel
    if kernel is None or (torch.is_grad_enabled() and x_sd.requires_grad):
        add_stretches_reference(y_so, x_sd, matrices, layout)
        return
    blocks, batches = layout.blocks(kernel.longest)
    kernel.add(y_so, x_sd, blocks)
    for batch in batches:
        _add_batch(y_so, x_sd, matrices, batch)


def add_stretches_reference(y_so: Tensor, x_sd: Tensor, matrices: Matrices, layout: Layout) -> None:
    """`add_stretches` by PyTorch's operations, on any device."""
    runs, batches = layout.runs
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
