"""The kernels of `kernels/int8_rows.py`: codes of rows, of rows less their main directions, and a
weight's codes turned.

Rows of gradients stay in registers between the search for their largest number and their codes.
What is left of x is wanted twice, and a tile of it is a product: the first kernel leaves each row's
largest magnitude, the second one makes the product again, which is cheaper than to write it down.
Magnitudes are compared as the whole numbers that their bits are, which puts a NaN above all others,
and is the same in any order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunefork.kernels.int8_range import LARGEST, LEAST

_MOST_PARTS = 3
_TURNED = 128
"""Rows and columns of a tile that is turned."""


class Tile(NamedTuple):
    """What a program of `round_apart` does, and how."""

    rows: int
    columns: int
    steps: int
    """Tiles of columns, one after the other, a power of two; fewer where there are few programs."""
    warps: int
    stages: int
    """Tiles of columns in shared memory."""


TILE = Tile(rows=64, columns=64, steps=8, warps=4, stages=3)
_PROGRAMS = 256
"""At least, where there are so many tiles: a GPU's processors are fewer."""


@triton.jit
def nearest(x):
    """fp32 of magnitudes below 2**22 to the nearest whole number, ties to even, in int8.

    1.5 * 2**23 added, the number is its sum's lowest bits: a conversion takes a GPU four times as
    long.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def magnitude(x):
    """The bits of |x|, which as int32 lie in the order of the magnitudes, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(most, least: tl.constexpr, largest: tl.constexpr):
    """Of the bits of a row's largest magnitude; of a NaN it is one."""
    most = most.to(tl.float32, bitcast=True)
    return tl.where(most < least, least, most) / largest


@triton.jit
def _load(
    pointer, fold, row, stride, first: tl.constexpr, size: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, block)
    x = tl.load(pointer + row * stride + column, mask=column < size, other=0.0).to(tl.float32)
    if fold is not None:
        x = x * tl.load(fold + first + column, mask=column < size, other=0.0)
    return x


@triton.jit
def _round_rows(
    p0, p1, p2, stride0, stride1, stride2, fold, codes, scales,
    size0: tl.constexpr, size1: tl.constexpr, size2: tl.constexpr,
    block0: tl.constexpr, block1: tl.constexpr, block2: tl.constexpr,
    least: tl.constexpr, largest: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    codes += row * (size0 + size1 + size2)
    x0 = _load(p0, fold, row, stride0, 0, size0, block0)
    most = tl.max(magnitude(x0), axis=0)
    if size1 > 0:
        x1 = _load(p1, fold, row, stride1, size0, size1, block1)
        most = tl.maximum(most, tl.max(magnitude(x1), axis=0))
    if size2 > 0:
        x2 = _load(p2, fold, row, stride2, size0 + size1, size2, block2)
        most = tl.maximum(most, tl.max(magnitude(x2), axis=0))
    scale = scale_of(most, least, largest)
    inverse = 1.0 / scale
    tl.store(scales + row, scale)
    at0 = tl.arange(0, block0)
    tl.store(codes + at0, nearest(x0 * inverse), mask=at0 < size0)
    if size1 > 0:
        at1 = tl.arange(0, block1)
        tl.store(codes + size0 + at1, nearest(x1 * inverse), mask=at1 < size1)
    if size2 > 0:
        at2 = tl.arange(0, block2)
        tl.store(codes + size0 + size1 + at2, nearest(x2 * inverse), mask=at2 < size2)


@triton.jit(do_not_specialize=["num_rows"])
def _apart(
    x, stride_x, inner, probe, stride_probe, most, scales, codes, num_rows, features,
    stride_inner: tl.constexpr, count: tl.constexpr, apart: tl.constexpr, writes: tl.constexpr,
    block_m: tl.constexpr, block_s: tl.constexpr, block_d: tl.constexpr,
    steps: tl.constexpr, stages: tl.constexpr, least: tl.constexpr, largest: tl.constexpr,
):  # fmt: skip
    # One number for both: a grid's second one ends at 65,535.
    number, across = tl.program_id(0), tl.cdiv(features, block_d * steps)
    # 64 bits to the first row, 32 from there: those are in every thread's registers many times.
    above = (number // across * block_s).to(tl.int64)
    x, inner, codes, most = (
        x + above * stride_x,
        inner + above * stride_inner,
        codes + above * features,
        most + above,
    )
    row, m = tl.arange(0, block_s), tl.arange(0, block_m)
    has_row, has_m = row < num_rows - above, m < apart
    at, first = row[:, None], number % across * (block_d * steps)
    z_at = inner + at * stride_inner + (count - apart + m)[None, :]
    z = tl.load(z_at, mask=has_row[:, None] & has_m[None, :], other=0.0)
    found = tl.zeros([block_s], tl.int32)
    if writes:
        scale = scale_of(tl.load(most + row, mask=has_row, other=0), least, largest)
        inverse = (-1.0 / scale)[:, None]
        if first == 0:
            tl.store(scales + above + row, scale, mask=has_row)
    for step in tl.range(steps, num_stages=stages):
        column = first + step * block_d + tl.arange(0, block_d)
        has_column = (column < features)[None, :]
        inside = has_row[:, None] & has_column
        whole = tl.load(x + at * stride_x + column[None, :], mask=inside, other=0.0)
        v_at = probe + m[:, None] * stride_probe + column[None, :]
        v = tl.load(v_at, mask=has_m[:, None] & has_column, other=0.0)
        # Summed onto -x, where the product's sums are: x - zV would need it beside them.
        rest = tl.dot(z, v, -whole.to(tl.float32))
        if writes:
            tl.store(codes + at * features + column[None, :], nearest(rest * inverse), mask=inside)
        else:
            found = tl.maximum(found, tl.max(magnitude(rest), axis=1))
    if not writes:
        tl.atomic_max(most + row, found, mask=has_row, sem="relaxed")


@triton.jit
def _turn(codes, out, num_rows, num_columns, block: tl.constexpr):
    row = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64)
    column = (tl.program_id(1) * block + tl.arange(0, block)).to(tl.int64)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    tile = tl.load(codes + row[:, None] * num_columns + column[None, :], mask=inside)
    to = out + column[:, None] * num_rows + row[None, :]
    tl.store(to, tl.trans(tile), mask=(column < num_columns)[:, None] & (row < num_rows)[None, :])


def round_rows(
    parts: Sequence[Tensor], fold_1d: Tensor | None, codes_sd: Tensor, scale_s1: Tensor
) -> None:
    """Fill codes and scales, contiguous, as `int8_rows.round_rows` says."""
    if len(parts) > _MOST_PARTS:
        # More layers with one input than any architecture has: side by side they are one part.
        parts = [torch.cat(list(parts), dim=1)]
    rows = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    missing = _MOST_PARTS - len(rows)
    sizes = [row.shape[1] for row in rows] + [0] * missing
    _round_rows[(len(codes_sd),)](
        *rows, *[rows[0]] * missing, *(row.stride(0) for row in rows), *[0] * missing,
        fold_1d if fold_1d is None else fold_1d.contiguous(), codes_sd, scale_s1,
        *sizes, *(triton.next_power_of_2(max(size, 1)) for size in sizes), LEAST, LARGEST,
        num_warps=4,
    )  # fmt: skip


def round_apart(
    x_sd: Tensor,
    inner_sp: Tensor,
    probe_md: Tensor,
    codes_sd: Tensor,
    scale_s1: Tensor,
    tile: Tile = TILE,
) -> None:
    """Fill codes and scales, contiguous, as `int8_rows.round_apart` says."""
    x_sd, inner_sp, probe_md = (
        t if t.stride(1) == 1 else t.contiguous() for t in (x_sd, inner_sp, probe_md)
    )
    (tokens, features), apart = x_sd.shape, len(probe_md)
    num_rows, steps = triton.cdiv(tokens, tile.rows), tile.steps
    while steps > 1 and num_rows * triton.cdiv(features, tile.columns * steps) < _PROGRAMS:
        steps //= 2
    grid = (num_rows * triton.cdiv(features, tile.columns * steps),)
    most_s = torch.zeros(tokens, dtype=torch.int32, device=x_sd.device)
    for writes in (False, True):
        _apart[grid](
            x_sd, x_sd.stride(0), inner_sp, probe_md, probe_md.stride(0), most_s, scale_s1,
            codes_sd, tokens, features, inner_sp.stride(0), inner_sp.shape[1], apart, writes,
            max(16, triton.next_power_of_2(apart)), tile.rows, tile.columns, steps, tile.stages,
            LEAST, LARGEST, num_warps=tile.warps,
        )  # fmt: skip


def turned(codes_od: Tensor) -> Tensor:
    """As `int8_rows.turned`, of codes that are contiguous."""
    out = codes_od.new_empty(codes_od.shape[1], codes_od.shape[0])
    grid = tuple(triton.cdiv(size, _TURNED) for size in codes_od.shape)
    _turn[grid](codes_od, out, *codes_od.shape, _TURNED, num_warps=8)
    return out
