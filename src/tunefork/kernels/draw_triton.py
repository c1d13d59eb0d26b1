"""The kernel of `kernels/draw.py`: a program a row, which reads it from the cache again and again.

A plain draw reads a row twice, one with top-k or top-p once more for each bit of a logit. As many
rows are computed at the same time as a GPU has multiprocessors, and nothing is written but tokens:
in PyTorch's operations a plain draw alone would read and write 480 MB for 64 rows of 128,256.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192
"""Logits that a program looks at together: it waits for memory once for all of them."""
_LOW_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Of fp32's, how many such a number does not have."""


@triton.jit
def _order(x, low_bits: tl.constexpr):
    """Whole numbers that are ordered as fp32's `x`, of which the last bits tell nothing."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> low_bits


@triton.jit
def _chances(
    logits, first, width, highest, temperature, least,
    per_one: tl.constexpr, low_bits: tl.constexpr, counts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Of the tokens from `first` on, 0 of those whose order is below `least`; or 1 of each."""
    token = first + tl.arange(0, block)
    x = tl.load(logits + token, mask=token < width, other=-float("inf")).to(tl.float32)
    if counts:
        chances = (token < width).to(tl.int64)
    else:
        chances = (tl.exp((x - highest) / temperature) * per_one).to(tl.int64)
    return tl.where(_order(x, low_bits) >= least.to(tl.int32), chances, 0)


@triton.jit
def _sum(
    logits, width, highest, temperature, least,
    per_one: tl.constexpr, low_bits: tl.constexpr, counts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([block], tl.int64)
    for first in range(0, width, block):
        total += _chances(
            logits, first, width, highest, temperature, least, per_one, low_bits, counts, block
        )
    return tl.sum(total, axis=0)


@triton.jit
def _bisect(
    logits, width, highest, temperature, least, wanted,
    per_one: tl.constexpr, low_bits: tl.constexpr, counts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The largest order, `least` or above, from which on there is as much as is wanted."""
    most = _order(highest, low_bits).to(tl.int64)
    while least < most:
        middle = most - ((most - least) >> 1)
        found = _sum(
            logits, width, highest, temperature, middle, per_one, low_bits, counts, block
        )  # fmt: skip
        if found >= wanted:
            least = middle
        else:
            most = middle - 1
    return least


@triton.jit
def _draw(
    logits, stride, tokens, told, width, columns: tl.constexpr,
    per_one: tl.constexpr, low_bits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    told += tl.program_id(0) * columns
    row = tl.load(told).to(tl.int64)
    best = tl.load(tokens + row)
    if best >= 0:
        temperature = tl.load(told + 1).to(tl.float32)
        top_k = tl.load(told + 2).to(tl.int64)
        top_p = tl.load(told + 3)
        uniform = tl.load(told + 4)
        own = logits + row * stride
        highest = tl.load(own + best).to(tl.float32)
        least = tl.full([], -(2**31), tl.int64)
        if (top_k > 0) & (top_k < width):
            least = _bisect(
                own, width, highest, temperature, least, top_k, per_one, low_bits, True, block
            )
        whole = _sum(own, width, highest, temperature, least, per_one, low_bits, False, block)
        if top_p < 1.0:
            wanted = tl.minimum((top_p * whole.to(tl.float64)).to(tl.int64), whole)
            wanted = tl.maximum(wanted, 1)
            least = _bisect(
                own, width, highest, temperature, least, wanted, per_one, low_bits, False, block
            )
            whole = _sum(
                own, width, highest, temperature, least, per_one, low_bits, False, block
            )  # fmt: skip
        at = tl.minimum((uniform * whole.to(tl.float64)).to(tl.int64), whole - 1)
        for first in range(0, width, block):
            chances = _chances(
                own, first, width, highest, temperature, least, per_one, low_bits, False, block
            )
            here = tl.sum(chances, axis=0)
            if (at >= 0) & (at < here):
                before = (tl.cumsum(chances, axis=0) <= at).to(tl.int32)
                tl.store(tokens + row, (first + tl.sum(before, axis=0)).to(tl.int64))
            at -= here


def launch(logits_rv: Tensor, tokens_r: Tensor, told_s5: Tensor, columns: int, unit: float) -> None:
    """As `draw.draw`, whose COLUMNS and UNIT are `columns` and `unit`."""
    if logits_rv.stride(1) != 1:
        logits_rv = logits_rv.contiguous()
    _draw[(len(told_s5),)](
        logits_rv,
        logits_rv.stride(0),
        tokens_r,
        told_s5,
        logits_rv.shape[1],
        columns,
        1.0 / unit,
        _LOW_BITS.get(logits_rv.dtype, 0),
        _BLOCK,
        num_warps=16,
    )
