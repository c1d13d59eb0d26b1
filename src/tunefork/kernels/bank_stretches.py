"""Many LoRA adapters over one base, read only: the host knows whose each stretch of tokens is.

What `bank_tokens.py` finds out on the device for every layer, the host knows once for the whole
pass: a GPU takes pieces of prompts in the order of their slots, as grouped products. What a CPU
makes of stretches is in `bank_rows.py`.

Shape legend: S tokens, D features in, O features out, N slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Stretch(NamedTuple):
    """Tokens `first` to `last` (exclusive) belong to `slot`."""

    slot: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All stretches of a pass. Tokens come in the order of slots, and those without one last."""

    ends_n: Tensor
    """Before which token each slot's end, int32, on the GPU."""
    num_tokens: int
    """How many have one."""


def lay_out_sorted(stretches: Sequence[Stretch], slots: int, device: torch.device) -> Layout:
    """`stretches` in the order of their slots, from token 0 on."""
    ends, at = [0] * slots, 0
    for stretch in stretches:
        if stretch.first != at:
            raise ValueError("tokens must be in the order of their slots")
        at = ends[stretch.slot] = stretch.last
    for slot in range(1, slots):
        ends[slot] = max(ends[slot], ends[slot - 1])
    host = torch.tensor(ends, dtype=torch.int32, pin_memory=device.type == "cuda")
    return Layout(host.to(device, non_blocking=True), at)


def add_sorted(y_so: Tensor, x_sd: Tensor, a_nrd: Tensor, b_nro: Tensor, layout: Layout) -> Tensor:
    """y += B_n A_n x of tokens in the order of their slots, in place; returns y. bf16."""
    tokens = slice(layout.num_tokens)
    u_sr = torch._grouped_mm(x_sd[tokens], a_nrd.transpose(1, 2), offs=layout.ends_n)
    y_so[tokens] += torch._grouped_mm(u_sr, b_nro, offs=layout.ends_n)
    return y_so
