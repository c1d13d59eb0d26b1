"""The kernel of `kernels/e4m3.py`: a row's largest magnitude and its codes in one pass.

A row stays in registers between the two. torch.compile makes two kernels of the definition, and
reads the row twice, as the delta's u = x A^T, a product, stands between x and the scale; for the
gradients of gate and up it computes SwiGLU's backward pass twice as well (measured: 78 ms of a step
of 16,384 tokens of an 8B model).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_PARTS = 3


@triton.jit
def _load(
    pointer, fold, row, stride, first: tl.constexpr, size: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """One part of a row, times its fold, fp32, with zeros up to the block's end."""
    column = tl.arange(0, block)
    inside = column < size
    x = tl.load(pointer + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if fold is not None:
        x = x * tl.load(fold + first + column, mask=inside, other=0.0)
    return x


@triton.jit
def _store(
    row_codes, x, inverse, first: tl.constexpr, size: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, block)
    tl.store(row_codes + first + column, (x * inverse).to(tl.float8e4nv), mask=column < size)


@triton.jit
def saturated(x, most: tl.constexpr):
    """Within +-most; a NaN, which minimum and maximum would take for a number, stays one."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -most), most), x)


@triton.jit
def _quantize_rows(
    p0, p1, p2, stride0, stride1, stride2, fold, u, stride_u, balance,
    codes, scales,
    size0: tl.constexpr, size1: tl.constexpr, size2: tl.constexpr,
    block0: tl.constexpr, block1: tl.constexpr, block2: tl.constexpr,
    rank: tl.constexpr, block_rank: tl.constexpr, width: tl.constexpr, block_width: tl.constexpr,
    least: tl.constexpr, largest_code: tl.constexpr, low_factor: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    total: tl.constexpr = size0 + size1 + size2 + width
    row_codes = codes + row * total
    x0 = _load(p0, fold, row, stride0, 0, size0, block0)
    largest = tl.max(tl.abs(x0), axis=0)
    if size1 > 0:
        x1 = _load(p1, fold, row, stride1, size0, size1, block1)
        largest = tl.maximum(largest, tl.max(tl.abs(x1), axis=0))
    if size2 > 0:
        x2 = _load(p2, fold, row, stride2, size0 + size1, size2, block2)
        largest = tl.maximum(largest, tl.max(tl.abs(x2), axis=0))
    if rank > 0:
        place = tl.arange(0, block_rank)
        v = tl.load(u + row * stride_u + place, mask=place < rank, other=0.0).to(tl.float32)
        v = v * tl.load(balance)
        largest = tl.maximum(largest, tl.max(tl.abs(v), axis=0))
    scale = tl.maximum(largest, least) / largest_code
    inverse = 1.0 / scale
    tl.store(scales + row, scale)
    _store(row_codes, x0, inverse, 0, size0, block0)
    if size1 > 0:
        _store(row_codes, x1, inverse, size0, size1, block1)
    if size2 > 0:
        _store(row_codes, x2, inverse, size0 + size1, size2, block2)
    delta = row_codes + (size0 + size1 + size2)
    if rank > 0:
        v = saturated(v * inverse, largest_code)
        high = v.to(tl.float8e4nv)
        wide = high.to(tl.float32)
        low = ((v - wide) * low_factor).to(tl.float8e4nv)
        tl.store(delta + place, high, mask=place < rank)
        tl.store(delta + rank + place, low, mask=place < rank)
        shrunk = (wide / low_factor).to(tl.float8e4nv)
        tl.store(delta + 2 * rank + place, shrunk, mask=place < rank)
    if width > 3 * rank:
        column = tl.arange(0, block_width)
        inside = column < width - 3 * rank
        rest = tl.zeros([block_width], tl.float32).to(tl.float8e4nv)
        tl.store(delta + 3 * rank + column, rest, mask=inside)


def launch(
    parts: Sequence[Tensor],
    fold: Tensor | None,
    u: Tensor | None,
    balance: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    *,
    least: float,
    largest_code: float,
    low_factor: float,
) -> tuple[Tensor, Tensor]:
    """Fill `codes` (S, D + P) and `scales` (S, 1) as `e4m3.quantize_rows` says, and return them.

    `least`, `largest_code` and `low_factor` are `e4m3.py`'s LEAST, LARGEST and LOW.
    """
    if len(parts) > _MOST_PARTS:
        # More layers with one input than any architecture has: side by side they are one part.
        parts = [torch.cat(list(parts), dim=1)]
    rows = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    if u is not None and u.stride(1) != 1:
        u = u.contiguous()
    sizes = [row.shape[1] for row in rows] + [0] * (_MOST_PARTS - len(rows))
    strides = [row.stride(0) for row in rows] + [0] * (_MOST_PARTS - len(rows))
    pointers = [*rows, *[rows[0]] * (_MOST_PARTS - len(rows))]
    rank = 0 if u is None else u.shape[1]
    width = codes.shape[1] - sum(sizes)
    _quantize_rows[(codes.shape[0],)](
        *pointers,
        *strides,
        fold,
        rows[0] if u is None else u,
        0 if u is None else u.stride(0),
        scales if balance is None else balance,
        codes,
        scales,
        *sizes,
        *(triton.next_power_of_2(max(size, 1)) for size in sizes),
        rank,
        triton.next_power_of_2(max(rank, 1)),
        width,
        triton.next_power_of_2(max(width - 3 * rank, 1)),
        least,
        largest_code,
        low_factor,
        num_warps=4,  # measured on an H200: more are slower at 4,096 columns, and at 28,672
    )
    return codes, scales
