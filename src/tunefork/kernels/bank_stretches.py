"""Many LoRA adapters over one base, read only: the host knows whose each stretch of tokens is.

What `bank_tokens.py` finds out on the device for every layer, the host knows once for the whole
pass. A CPU's time is the number of calls: one padded batched product for all short stretches
(requests that decode, sorted by slot) and for neighbours of one length, and two products for any
other long one (a prompt), added in place. What a GPU makes of stretches is in `bank_read.py`.

In bf16 on a CPU A is kept in fp32, and B in bf16: of one core of an EPYC, for 16 tokens of 8 slots,
x A takes 37 us as a batched product in fp32 (D = 576), and its B, added to y (O = 1536), 49 us as a
weighted sum of rows (`embedding_bag`) in place of 74 us as a batched product in fp32.

Shape legend: S tokens, D features in, O features out, N slots, R rank, P padded places.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_SHORT = 64
"""Most tokens of a stretch that is padded rather than multiplied by itself."""
_GAP = 4
_VIEWS = 64
"""Most pairs of views that a layer keeps, 1 KB each: there are as many as runs of slots, times
ranks."""
_FEW = 4
"""Most tokens of a stretch whose B is summed row by row, in bf16: B is read once for each token."""


class Stretch(NamedTuple):
    """Tokens `first` to `last` (exclusive) belong to `slot`."""

    slot: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Padded:
    """Short stretches side by side, one of each of the slots `lowest` to `highest` (exclusive)."""

    lowest: int
    highest: int
    first: int
    last: int
    """Of their tokens (exclusive)."""
    places_p: Tensor | None
    """(P,) the token at each place, less `first`; None: they fill their places exactly."""
    back_s: Tensor | None
    """The place of each token."""
    width: int
    """Places of each slot."""
    slots: tuple[int, ...]
    """Of each token."""
    made: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rows(self, rank: int, stride: int) -> tuple[Tensor, Tensor]:
        """Where the first `rank` rows of each token's slot lie, of `stride` rows a slot, one token
        after the other; and where each token's begin."""
        if (rank, stride) not in self.made:
            rows_sr = torch.tensor(self.slots)[:, None] * stride + torch.arange(rank)
            self.made[rank, stride] = rows_sr.flatten(), torch.arange(0, rows_sr.numel(), rank)
        return self.made[rank, stride]

    def sums_rows(self, dtype: torch.dtype) -> bool:
        """Whether each token's B is summed row by row."""
        return self.width <= _FEW and dtype == torch.bfloat16


class Inputs:
    """What padded products take of an input; made once for layers that are given the same one."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._parts: list[Tensor] = []

    def parts(self, x_d: Tensor, layout: "Layout", wide: torch.dtype) -> list[Tensor]:
        """(slots, width, D) of each of `layout.padded`."""
        if self._of is not x_d:
            x_sd = x_d.reshape(-1, x_d.shape[-1])
            self._of, self._parts = x_d, [_places(x_sd, part, wide) for part in layout.padded]
        return self._parts


def _places(x_sd: Tensor, part: Padded, wide: torch.dtype) -> Tensor:
    x_td = x_sd[part.first : part.last]
    if part.sums_rows(x_sd.dtype):
        x_td = x_td.to(wide)
    if part.places_p is not None:
        x_td = x_td.index_select(0, part.places_p)
    return x_td.view(part.highest - part.lowest, part.width, -1)


@dataclass(frozen=True, slots=True)
class Layout:
    """All stretches of a pass. Tokens in none of them see the base alone."""

    rank: int
    """The largest of the adapters there; rows of A and B behind it are zero."""
    padded: tuple[Padded, ...]
    long: tuple[Stretch, ...]
    inputs: Inputs = field(default_factory=Inputs)


def lay_out(stretches: Sequence[Stretch], rank: int, device: torch.device | None = None) -> Layout:
    """`stretches` in the order of their tokens, for `add_stretches`."""
    runs: list[list[Stretch]] = []
    for stretch in stretches:
        if runs and _follows(runs[-1][-1], stretch):
            runs[-1].append(stretch)
        else:
            runs.append([stretch])
    is_long = [len(run) == 1 and _length(run[0]) > _SHORT for run in runs]
    padded = [_pad(run, device) for run, alone in zip(runs, is_long, strict=True) if not alone]
    long = [run[0] for run, alone in zip(runs, is_long, strict=True) if alone]
    return Layout(rank, tuple(padded), tuple(long))


def _length(stretch: Stretch) -> int:
    return stretch.last - stretch.first


def _follows(before: Stretch, stretch: Stretch) -> bool:
    """Whether it may lie in the same product: next to it, few slots between, and of its length."""
    gap = stretch.slot - before.slot
    if stretch.first != before.last or not 0 < gap <= _GAP:
        return False
    shorter, longer = sorted((_length(before), _length(stretch)))
    if longer > _SHORT:  # places that stay empty would cost more than a product of its own
        return gap == 1 and shorter == longer
    return longer <= 2 * shorter + 2


def _pad(run: Sequence[Stretch], device: torch.device | None) -> Padded:
    first, last = run[0].first, run[-1].last
    lowest, highest = run[0].slot, run[-1].slot + 1
    width = max(map(_length, run))
    slots = tuple(stretch.slot for stretch in run for _ in range(_length(stretch)))
    if (last - first) == width * (highest - lowest):
        return Padded(lowest, highest, first, last, None, None, width, slots)
    places, back = [0] * (width * (highest - lowest)), []
    for stretch in run:
        for at, token in enumerate(range(stretch.first, stretch.last)):
            place = (stretch.slot - lowest) * width + at
            places[place] = token - first
            back.append(place)
    places_p = torch.tensor(places, device=device)
    back_s = torch.tensor(back, device=device)
    return Padded(lowest, highest, first, last, places_p, back_s, width, slots)


class Matrices:
    """One layer's A (N, R, D) and B transposed (N, R, O), and the views of them that passes take:
    making some views is as long as a small product."""

    def __init__(self, a_nrd: Tensor, b_nro: Tensor) -> None:
        self.a_nrd, self.b_nro = a_nrd, b_nro
        self.rows_b = b_nro.flatten(0, 1)
        self._views: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def of(self, part: Padded, rank: int) -> tuple[Tensor, Tensor]:
        """A transposed (G, D, R) and B (G, R, O) of a part's slots."""
        key = (part.lowest, part.highest, rank)
        if key not in self._views:
            if len(self._views) == _VIEWS:
                self._views.clear()
            slots = slice(part.lowest, part.highest)
            self._views[key] = (
                self.a_nrd[slots, :rank].transpose(1, 2),
                self.b_nro[slots, :rank],
            )
        return self._views[key]


def add_stretches(y_so: Tensor, x_d: Tensor, matrices: Matrices, layout: Layout) -> Tensor:
    """y += B_n A_n x over each slot's tokens, in place; returns y. A carries the scale, and may be
    wider than the rest. x is (..., D): layers that are given the very same one share its parts."""
    rank, a_nrd, b_nro = layout.rank, matrices.a_nrd, matrices.b_nro
    if layout.long:
        x_sd = x_d.reshape(-1, x_d.shape[-1])
        for slot, first, last in layout.long:
            a_rd = a_nrd[slot, :rank].to(x_sd.dtype)
            y_so[first:last].addmm_(x_sd[first:last] @ a_rd.t(), b_nro[slot, :rank])
    parts = layout.inputs.parts(x_d, layout, a_nrd.dtype)
    for part, x_gmd in zip(layout.padded, parts, strict=True):
        a_gdr, b_gro = matrices.of(part, rank)
        own_so = y_so[part.first : part.last]
        if part.sums_rows(y_so.dtype):
            _add_rows(own_so, torch.bmm(x_gmd, a_gdr), matrices, part)
            continue
        u_gmr = torch.bmm(x_gmd, a_gdr.to(x_gmd.dtype))
        if part.back_s is None:
            own_so.view(*u_gmr.shape[:2], -1).baddbmm_(u_gmr, b_gro)
        else:
            own_so += torch.bmm(u_gmr, b_gro).flatten(0, 1).index_select(0, part.back_s)
    return y_so


def _add_rows(y_so: Tensor, u_gmr: Tensor, matrices: Matrices, part: Padded) -> None:
    """Each token's u times the rows of its own B."""
    if part.back_s is not None:
        u_gmr = u_gmr.flatten(0, 1).index_select(0, part.back_s)
    rows, starts = part.rows(u_gmr.shape[-1], matrices.b_nro.shape[1])
    weights = u_gmr.to(y_so.dtype).view(-1)
    y_so += torch.embedding_bag(matrices.rows_b, rows, starts, False, 0, False, weights)[0]
