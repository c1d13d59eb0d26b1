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
    """A whole number, ordered as fp32's `x`, of which the last bits tell nothing."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> low_bits


@triton.jit
def _value(order, low_bits: tl.constexpr):
    """Of which `order` is the order."""
    bits = order.to(tl.int32) << low_bits
    bits = bits | ((bits >> 31) & ((1 << low_bits) - 1))
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _chances(
    logits, first, width, highest, sharpness, least,
    per_one: tl.constexpr, counts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Of the tokens from `first` on whose logit is `least` or above, else 0; or 1 of each."""
    token = first + tl.arange(0, block)
    x = tl.load(logits + token, mask=token < width, other=-float("inf")).to(tl.float32)
    if counts:
        chances = (token < width).to(tl.int64)
    else:
        chances = (tl.exp((x - highest) * sharpness) * per_one).to(tl.int64)
    return tl.where(x >= least, chances, 0)


@triton.jit
def _sum(
    logits, width, highest, sharpness, least,
    per_one: tl.constexpr, counts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([block], tl.int64)
    for first in range(0, width, block):
        total += _chances(
            logits, first, width, highest, sharpness, least, per_one, counts, block
        )  # fmt: skip
    return tl.sum(total, axis=0)


@triton.jit
def _bisect(
    logits, width, highest, sharpness, least, wanted,
    per_one: tl.constexpr, low_bits: tl.constexpr, counts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The largest logit, `least` or above, from which on there is as much as is wanted."""
    low = _order(least, low_bits).to(tl.int64)
    high = _order(highest, low_bits).to(tl.int64)
    while low < high:
        middle = high - ((high - low) >> 1)
        at = _value(middle, low_bits)
        if _sum(logits, width, highest, sharpness, at, per_one, counts, block) >= wanted:
            low = middle
        else:
            high = middle - 1
    return _value(low, low_bits)


@triton.jit
def _draw(
    logits, stride, tokens, told, width, columns: tl.constexpr,
    per_one: tl.constexpr, low_bits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    told += tl.program_id(0) * columns
    row = tl.load(told).to(tl.int64)
    best = tl.load(tokens + row)
    if best >= 0:
        sharpness = (1.0 / tl.load(told + 1)).to(tl.float32)
        top_k = tl.load(told + 2).to(tl.int64)
        top_p = tl.load(told + 3)
        uniform = tl.load(told + 4)
        own = logits + row * stride
        highest = tl.load(own + best).to(tl.float32)
        least = highest - float("inf")
        if (top_k > 0) & (top_k < width):
            least = _bisect(
                own, width, highest, sharpness, least, top_k, per_one, low_bits, True, block
            )
        whole = _sum(own, width, highest, sharpness, least, per_one, False, block)
        if top_p < 1.0:
            wanted = tl.minimum((top_p * whole.to(tl.float64)).to(tl.int64), whole)
            wanted = tl.maximum(wanted, 1)
            least = _bisect(
                own, width, highest, sharpness, least, wanted, per_one, low_bits, False, block
            )
            whole = _sum(own, width, highest, sharpness, least, per_one, False, block)
        at = tl.minimum((uniform * whole.to(tl.float64)).to(tl.int64), whole - 1)
        for first in range(0, width, block):
            chances = _chances(
                own, first, width, highest, sharpness, least, per_one, False, block
            )  # fmt: skip
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
