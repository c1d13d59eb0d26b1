"""Many LoRA adapters over one base, read only, in a pass of few tokens that has prompts in it.

Until some hundred tokens a GPU waits for the weights, and u of all slots comes with the base's
product for little more than A's bytes, as while rows decode. `down` (`bank_read.py`) would have a
program for each tile, that reads its slot's A from end to end: with 64 rows over 32 adapters, 35
programs on 132 processors, bound by how long a read takes. So here

    rows that decode   are added to row by row, by `add_own`
    prompts            in tiles of one slot, by an `up` that finds u among those of all slots

Numbers of both lie on the device, so that a captured CUDA graph serves any mix. The second one's
kernel is in `bank_mixed_triton.py`.

Shape legend as in `bank_read.py`; M tokens that the pass begins with, of which any may decode.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tunefork.kernels.bank_read import TILE, add_own, add_own_reference, by_layer
from tunefork.kernels.compiled import is_on_gpu


class Mixed(NamedTuple):
    """Whose the tokens of a pass are: rows that decode first, then pieces of prompts."""

    slot_m: Tensor
    """(M,) int32: the slot of each of the first tokens, -1 where it has none or does not decode."""
    numbers_t3: Tensor
    """As `Tiles`, of the other tokens that have a slot; those that are no tiles come last."""
    size: int = TILE


def add_mixed(
    y_so: Tensor, u_sk: Tensor, mixed: Mixed, b: Tensor, sizes: Sequence[int], rank: int
) -> None:
    """y (S, O) += B_n u_n in place, n each token's slot; without one y stays. O is the sum of
    `sizes`.

    u (S, L N R) is of all slots, layer after layer. Summed in fp32, rounded once.
    """
    if torch.compiler.is_compiling():
        torch.ops.tunefork.bank_add_mixed(y_so, u_sk, *mixed, b, list(sizes), rank)
    else:
        _add_mixed(y_so, u_sk, mixed, b, sizes, rank)


def _add_mixed(
    y_so: Tensor, u_sk: Tensor, mixed: Mixed, b: Tensor, sizes: Sequence[int], rank: int
) -> None:
    if is_on_gpu(y_so) and y_so.dtype == torch.bfloat16:
        from tunefork.kernels import bank_mixed_triton  # needs Triton, which comes with CUDA

        first = slice(0, len(mixed.slot_m))
        add_own(y_so[first], u_sk[first], mixed.slot_m, b, sizes, rank)
        return bank_mixed_triton.up(y_so, u_sk, b, mixed.numbers_t3, mixed.size, sizes, rank)
    return add_mixed_reference(y_so, u_sk, mixed, b, sizes, rank)


def add_mixed_reference(
    y_so: Tensor, u_sk: Tensor, mixed: Mixed, b: Tensor, sizes: Sequence[int], rank: int
) -> None:
    """The definition of `add_mixed`."""
    first, slots = slice(0, len(mixed.slot_m)), b.numel() // (rank * sum(sizes))
    add_own_reference(y_so[first], u_sk[first], mixed.slot_m, b, sizes, rank)
    ys, us = torch.split(y_so, list(sizes), dim=1), u_sk.chunk(len(sizes), dim=1)
    for y_to, u_tk, b_nro in zip(ys, us, by_layer(b, sizes, slots, rank), strict=True):
        for slot, begin, count in mixed.numbers_t3.tolist():
            tokens, terms = slice(begin, begin + count), slice(slot * rank, (slot + 1) * rank)
            if count:
                y_to[tokens].addmm_(u_tk[tokens, terms], b_nro[slot])


@torch.library.custom_op("tunefork::bank_add_mixed", mutates_args=("y",))
def _bank_add_mixed(
    y: Tensor,
    u: Tensor,
    slots: Tensor,
    tiles: Tensor,
    size: int,
    b: Tensor,
    sizes: Sequence[int],
    rank: int,
) -> None:
    _add_mixed(y, u, Mixed(slots, tiles, size), b, sizes, rank)
