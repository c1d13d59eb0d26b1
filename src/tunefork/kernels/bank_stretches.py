"""Many LoRA adapters over one base, read only: the host knows whose each stretch of tokens is.

What `bank_tokens.py` finds out on the device for every layer, the host knows once for the whole
pass. A CPU's time is the number of calls: one padded batched product for all short stretches
(requests that decode, sorted by slot), and two products for each long one (a prompt), added in
place. A GPU takes pieces of prompts in the order of their slots, as grouped products.

Deltas may be wider than the activations (fp32 beside bf16): small batched products are quicker in
fp32 on a CPU (8 x (2 x 576) x (576 x 16): 19 us against 35 us in bf16, one core of an EPYC).

Shape legend: S tokens, D features in, O features out, N slots, R rank, P padded places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_SHORT = 64
"""Most tokens of a stretch that is padded rather than multiplied by itself."""
_GAP = 4


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


@dataclass(frozen=True, slots=True)
class Layout:
    """All stretches of a pass. Tokens in none of them see the base alone."""

    rank: int
    """The largest of the adapters there; rows of A and B behind it are zero."""
    padded: tuple[Padded, ...]
    long: tuple[Stretch, ...]
    ends_n: Tensor | None = None
    """On a GPU: before which token each slot's end, int32. Tokens come in the order of slots, and
    those without one last."""
    num_tokens: int = 0
    """On a GPU: how many have one."""


def lay_out_sorted(stretches: Sequence[Stretch], slots: int, device: torch.device) -> Layout:
    """For a GPU: `stretches` in the order of their slots, from token 0 on."""
    ends, at = [0] * slots, 0
    for stretch in stretches:
        if stretch.first != at:
            raise ValueError("tokens must be in the order of their slots")
        at = ends[stretch.slot] = stretch.last
    for slot in range(1, slots):
        ends[slot] = max(ends[slot], ends[slot - 1])
    host = torch.tensor(ends, dtype=torch.int32, pin_memory=device.type == "cuda")
    return Layout(0, (), (), host.to(device, non_blocking=True), at)


def add_sorted(y_so: Tensor, x_sd: Tensor, a_nrd: Tensor, b_nro: Tensor, layout: Layout) -> Tensor:
    """y += B_n A_n x of tokens in the order of their slots, in place; returns y. bf16."""
    assert layout.ends_n is not None
    tokens = slice(layout.num_tokens)
    u_sr = torch._grouped_mm(x_sd[tokens], a_nrd.transpose(1, 2), offs=layout.ends_n)
    y_so[tokens] += torch._grouped_mm(u_sr, b_nro, offs=layout.ends_n)
    return y_so


def lay_out(stretches: Sequence[Stretch], rank: int, device: torch.device | None = None) -> Layout:
    """`stretches` in the order of their tokens, for `add_stretches`."""
    padded: list[Padded] = []
    run: list[Stretch] = []
    for stretch in [s for s in stretches if s.last - s.first <= _SHORT]:
        if run and not _follows(run[-1], stretch):
            padded.append(_pad(run, device))
            run = []
        run.append(stretch)
    if run:
        padded.append(_pad(run, device))
    long = tuple(s for s in stretches if s.last - s.first > _SHORT)
    return Layout(rank, tuple(padded), long)


def _follows(before: Stretch, stretch: Stretch) -> bool:
    """Whether it may lie in the same product: next to it, few slots between, and of its length."""
    is_near = stretch.first == before.last and 0 < stretch.slot - before.slot <= _GAP
    lengths = sorted((before.last - before.first, stretch.last - stretch.first))
    return is_near and lengths[1] <= 2 * lengths[0] + 2


def _pad(run: Sequence[Stretch], device: torch.device | None) -> Padded:
    first, last = run[0].first, run[-1].last
    lowest, highest = run[0].slot, run[-1].slot + 1
    width = max(stretch.last - stretch.first for stretch in run)
    if (last - first) == width * (highest - lowest):
        return Padded(lowest, highest, first, last, None, None)
    places, back = [0] * (width * (highest - lowest)), []
    for stretch in run:
        for at, token in enumerate(range(stretch.first, stretch.last)):
            place = (stretch.slot - lowest) * width + at
            places[place] = token - first
            back.append(place)
    places_p = torch.tensor(places, device=device)
    back_s = torch.tensor(back, device=device)
    return Padded(lowest, highest, first, last, places_p, back_s)


def add_stretches(
    y_so: Tensor, x_sd: Tensor, a_nrd: Tensor, b_nro: Tensor, layout: Layout
) -> Tensor:
    """y += B_n A_n x over each slot's tokens, in place; returns y. A carries the scale."""
    rank = layout.rank
    for slot, first, last in layout.long:
        a_rd, b_ro = a_nrd[slot, :rank].to(x_sd.dtype), b_nro[slot, :rank].to(x_sd.dtype)
        y_so[first:last].addmm_(x_sd[first:last] @ a_rd.t(), b_ro)
    for part in layout.padded:
        a_grd = a_nrd[part.lowest : part.highest, :rank]
        b_gro = b_nro[part.lowest : part.highest, :rank]
        slots = part.highest - part.lowest
        x_td = x_sd[part.first : part.last].to(a_nrd.dtype)
        if part.places_p is not None:
            x_td = x_td.index_select(0, part.places_p)
        u_gmr = torch.bmm(x_td.view(slots, -1, x_td.shape[1]), a_grd.transpose(1, 2))
        delta_to = torch.bmm(u_gmr, b_gro).flatten(0, 1)
        if part.back_s is not None:
            delta_to = delta_to.index_select(0, part.back_s)
        y_so[part.first : part.last] += delta_to
    return y_so
