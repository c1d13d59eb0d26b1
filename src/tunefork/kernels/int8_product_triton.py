"""`kernels/int8_product.py` where `narrow_product.cu` is not for: GPUs before Hopper and after.

The same sums in one kernel of Triton's: codes into int32, scaled in registers, the narrow product
added to them there. Compiled for the GPUs from Ampere on, and measured on none.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What a program makes, and how."""

    rows: int
    columns: int
    features: int
    """Of a step of the sums over codes."""
    group: int
    """Tiles, one below the other, that take all columns before the next ones."""
    warps: int
    stages: int


TILE = Tile(rows=128, columns=128, features=64, group=8, warps=8, stages=4)
"""64 KiB of shared memory, of which the smallest of these GPUs has 99. Not measured."""
_NARROW = 16
"""Columns of a step of the narrow product."""


@triton.jit(do_not_specialize=["num_rows"])
def _product(
    a, b, scale_m, scale_n, u, v, y, num_rows, num_columns,
    features: tl.constexpr, narrow: tl.constexpr, has_scale_n: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, block_p: tl.constexpr,
    group: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(num_columns, block_n)
    first = tl.program_id(0) // (group * across) * group
    size = tl.minimum(tl.cdiv(num_rows, block_m) - first, group)
    place = tl.program_id(0) % (group * across)
    row = ((first + place % size) * block_m + tl.arange(0, block_m)).to(tl.int64)
    column = (place // size * block_n + tl.arange(0, block_n)).to(tl.int64)
    has_row, has_column = row < num_rows, column < num_columns
    at_k, at_p = tl.arange(0, block_k), tl.arange(0, block_p)
    a_at, b_at = a + row[:, None] * features, b + column[:, None] * features
    sums = tl.zeros([block_m, block_n], tl.int32)
    for begin in tl.range(0, features, block_k):
        k = begin + at_k[None, :]
        a_mk = tl.load(a_at + k, mask=has_row[:, None] & (k < features), other=0)
        b_nk = tl.load(b_at + k, mask=has_column[:, None] & (k < features), other=0)
        sums = tl.dot(a_mk, tl.trans(b_nk), sums, out_dtype=tl.int32)
    y_mn = sums.to(tl.float32) * tl.load(scale_m + row, mask=has_row, other=0.0)[:, None]
    if has_scale_n:
        y_mn = y_mn * tl.load(scale_n + column, mask=has_column, other=0.0)[None, :]
    if narrow > 0:  # else u and v are codes, of which no such product is compiled
        for begin in tl.range(0, narrow, block_p):
            p = begin + at_p[None, :]
            u_at, v_at = u + row[:, None] * narrow + p, v + column[:, None] * narrow + p
            u_mp = tl.load(u_at, mask=has_row[:, None] & (p < narrow), other=0.0)
            v_np = tl.load(v_at, mask=has_column[:, None] & (p < narrow), other=0.0)
            y_mn = tl.dot(u_mp, tl.trans(v_np), y_mn)
    to = y + row[:, None] * num_columns + column[None, :]
    tl.store(to, y_mn.to(tl.bfloat16), mask=has_row[:, None] & has_column[None, :])


def launch(
    operands: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor | None],
    narrow: tuple[Tensor, Tensor] | None,
    y_mn: Tensor,
    tile: Tile = TILE,
) -> None:
    """Fill `y`; all is contiguous."""
    (a_mk, b_nk), (scale_m, scale_n), (u_mp, v_np) = operands, scales, narrow or operands
    (m, n), k = y_mn.shape, a_mk.shape[1]
    _product[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)](
        a_mk, b_nk, scale_m, scale_m if scale_n is None else scale_n, u_mp, v_np, y_mn, m, n,
        k, 0 if narrow is None else u_mp.shape[1], scale_n is not None,
        tile.rows, tile.columns, tile.features, _NARROW, tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
