"""The kernel of `kernels/e4m3_apart.py`: x read once, its codes written once.

A program takes a tile of rows and goes over a few tiles of columns, of which the next is fetched
while one is worked on. It reads the rows' z once and V for each tile, both from the cache: with few
rows that would be more than memory gives at the same time. One program of each tile of rows writes
the delta's columns.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tunefork.kernels.e4m3_triton import saturated


class Tile(NamedTuple):
    """What a program does, and how."""

    rows: int
    columns: int
    steps: int
    """Tiles of columns, one after the other, a power of two; fewer where there are few programs."""
    warps: int
    stages: int
    """Tiles of columns in shared memory."""


TILE = Tile(rows=64, columns=64, steps=8, warps=4, stages=3)
"""The quickest of fifteen on an H200, with few tokens too: 5 to 8 % quicker than twice the rows,
which read V half as often."""
_DELTA = 16
"""Columns of the delta that are written at once: few, whatever the rank, so that these programs
need no more registers than the others; 16 more where a rank is odd."""
_PROGRAMS = 256
"""At least, where there are so many tiles: a GPU's processors are fewer."""


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_apart(
    x, stride_x, inner, probe, stride_probe, balance, scale, codes, stride_codes,
    num_rows, features, width,
    stride_inner: tl.constexpr, count: tl.constexpr, apart: tl.constexpr,
    block_m: tl.constexpr, block_s: tl.constexpr, block_d: tl.constexpr,
    steps: tl.constexpr, stages: tl.constexpr, block_r: tl.constexpr,
    largest_code: tl.constexpr, low_factor: tl.constexpr,
):  # fmt: skip
    # One number for both: a grid's second one ends at 65,535.
    number, across = tl.program_id(0), tl.cdiv(features, block_d * steps) + 1
    # 64 bits to the first row, 32 from there: those are in every thread's registers many times.
    above = (number // across * block_s).to(tl.int64)
    x, inner, codes = (
        x + above * stride_x,
        inner + above * stride_inner,
        codes + above * stride_codes,
    )
    row = tl.arange(0, block_s)
    has_row = row < num_rows - above
    at = row[:, None]
    inverse = (1.0 / tl.load(scale + above + row, mask=has_row, other=1.0))[:, None]
    # The delta's program is a row's first: it may take longer, and the last would be waited for.
    first = (number % across - 1) * (block_d * steps)
    if first >= 0:
        m = tl.arange(0, block_m)
        has_m = m < apart
        z_at = inner + at * stride_inner + (count - apart + m)[None, :]
        z = tl.load(z_at, mask=has_row[:, None] & has_m[None, :], other=0.0)
        for step in tl.range(steps, num_stages=stages):
            column = first + step * block_d + tl.arange(0, block_d)
            has_column = (column < features)[None, :]
            inside = has_row[:, None] & has_column
            whole = tl.load(x + at * stride_x + column[None, :], mask=inside, other=0.0)
            v_at = probe + m[:, None] * stride_probe + column[None, :]
            v = tl.load(v_at, mask=has_m[:, None] & has_column, other=0.0)
            # Summed onto -x, where the product's sums are: x - zV would need it beside them.
            rest = tl.dot(z, v, -whole.to(tl.float32)) * -inverse
            place = at * stride_codes + column[None, :]
            tl.store(codes + place, rest.to(tl.float8e4nv), mask=inside)
    else:
        column = tl.arange(0, block_r)[None, :]
        given = tl.load(balance)
        delta = codes + at * stride_codes + features
        for start in tl.range(0, count, block_r):
            place = start + column
            inside = has_row[:, None] & (place < count)
            u = tl.load(inner + at * stride_inner + place, mask=inside, other=0.0).to(tl.float32)
            u = saturated(u * given * inverse, largest_code)
            high = u.to(tl.float8e4nv)
            wide = high.to(tl.float32)
            tl.store(delta + place, high, mask=inside)
            low = ((u - wide) * low_factor).to(tl.float8e4nv)
            tl.store(delta + count + place, low, mask=inside)
            shrunk = (wide / low_factor).to(tl.float8e4nv)
            tl.store(delta + 2 * count + place, shrunk, mask=inside)
        for start in tl.range(3 * count, width, block_r):
            inside = has_row[:, None] & (start + column < width)
            zeros = tl.zeros([block_s, block_r], tl.float32).to(tl.float8e4nv)
            tl.store(delta + start + column, zeros, mask=inside)


def launch(
    x: Tensor,
    inner: Tensor,
    apart: int,
    probe: Tensor,
    balance: Tensor,
    scale: Tensor,
    codes: Tensor,
    *,
    largest_code: float,
    low_factor: float,
    tile: Tile = TILE,
) -> Tensor:
    """Fill `codes` (S, D + P) as `e4m3_apart.quantize_apart` says, and return them.

    `largest_code` and `low_factor` are `e4m3.py`'s LARGEST and LOW.
    """
    # The kernel takes sizes of `inner` for constants: what they are multiples of says how many
    # numbers are read at once.
    x, inner, probe = (t if t.stride(1) == 1 else t.contiguous() for t in (x, inner, probe))
    (tokens, features), count = x.shape, inner.shape[1]
    num_rows, steps = triton.cdiv(tokens, tile.rows), tile.steps
    while steps > 1 and num_rows * triton.cdiv(features, tile.columns * steps) < _PROGRAMS:
        steps //= 2
    _quantize_apart[(num_rows * (triton.cdiv(features, tile.columns * steps) + 1),)](
        x,
        x.stride(0),
        inner,
        probe,
        probe.stride(0),
        balance,
        scale.contiguous(),
        codes,
        codes.stride(0),
        tokens,
        features,
        codes.shape[1] - features,
        inner.stride(0),
        count,
        apart,
        triton.next_power_of_2(apart),
        tile.rows,
        tile.columns,
        steps,
        tile.stages,
        _DELTA,
        largest_code,
        low_factor,
        num_warps=tile.warps,
    )
    return codes
