"""Rows in int8 on a GPU, for `int8_trial.py`: codes of rows, of rows less their main directions,
and a weight's codes turned.

A row's scale takes its largest magnitude to 127, and numbers go to the nearest code, ties to even:
adding and taking 1.5 * 2**23 rounds an fp32 number of less than 2**22 so. No number may be infinite
or NaN.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST, _LEAST = 127.0, 1e-30
_MOST_PARTS = 3
_ROWS, _COLUMNS = 64, 64
"""Of a tile of rows that are less their directions."""
_TURNED = 128
"""Rows and columns of a tile that is turned."""


@triton.jit
def _code(x):
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


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
def _round(
    p0, p1, p2, stride0, stride1, stride2, fold, codes, scales,
    size0: tl.constexpr, size1: tl.constexpr, size2: tl.constexpr,
    block0: tl.constexpr, block1: tl.constexpr, block2: tl.constexpr,
    largest: tl.constexpr, least: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    codes += row * (size0 + size1 + size2)
    x0 = _load(p0, fold, row, stride0, 0, size0, block0)
    most = tl.max(tl.abs(x0), axis=0)
    if size1 > 0:
        x1 = _load(p1, fold, row, stride1, size0, size1, block1)
        most = tl.maximum(most, tl.max(tl.abs(x1), axis=0))
    if size2 > 0:
        x2 = _load(p2, fold, row, stride2, size0 + size1, size2, block2)
        most = tl.maximum(most, tl.max(tl.abs(x2), axis=0))
    scale = tl.maximum(most, least) / largest
    inverse = 1.0 / scale
    tl.store(scales + row, scale)
    at0 = tl.arange(0, block0)
    tl.store(codes + at0, _code(x0 * inverse), mask=at0 < size0)
    if size1 > 0:
        at1 = tl.arange(0, block1)
        tl.store(codes + size0 + at1, _code(x1 * inverse), mask=at1 < size1)
    if size2 > 0:
        at2 = tl.arange(0, block2)
        tl.store(codes + size0 + size1 + at2, _code(x2 * inverse), mask=at2 < size2)


@triton.jit
def _rest(
    x, z, probe, row, column, stride_x, stride_probe, num_rows, features, m, apart: tl.constexpr
):  # fmt: skip
    """A tile of z V - x, fp32, zeros outside."""
    inside = (row < num_rows)[:, None] & (column < features)[None, :]
    whole = tl.load(x + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0)
    v_at = probe + m[:, None] * stride_probe + column[None, :]
    v = tl.load(v_at, mask=(m < apart)[:, None] & (column < features)[None, :], other=0.0)
    return tl.dot(z, v, -whole.to(tl.float32)), inside


@triton.jit(do_not_specialize=["num_rows"])
def _round_apart(
    x, stride_x, inner, stride_inner, probe, stride_probe, codes, scales, num_rows,
    features: tl.constexpr, count: tl.constexpr, apart: tl.constexpr, block_m: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, largest: tl.constexpr, least: tl.constexpr,
):  # fmt: skip
    above = tl.program_id(0).to(tl.int64) * rows
    x, inner, codes = x + above * stride_x, inner + above * stride_inner, codes + above * features
    left = num_rows - above
    row, m, across = tl.arange(0, rows), tl.arange(0, block_m), tl.arange(0, columns)
    z_at = inner + row[:, None] * stride_inner + (count - apart + m)[None, :]
    z = tl.load(z_at, mask=(row < left)[:, None] & (m < apart)[None, :], other=0.0)
    most = tl.zeros([rows], tl.float32)
    for begin in tl.range(0, features, columns):
        rest, _ = _rest(
            x, z, probe, row, begin + across, stride_x, stride_probe, left, features, m, apart
        )
        most = tl.maximum(most, tl.max(tl.abs(rest), axis=1))
    scale = tl.maximum(most, least) / largest
    tl.store(scales + above + row, scale, mask=row < left)
    inverse = (-1.0 / scale)[:, None]
    for begin in tl.range(0, features, columns):
        column = begin + across
        rest, inside = _rest(
            x, z, probe, row, column, stride_x, stride_probe, left, features, m, apart
        )
        place = row[:, None] * features + column[None, :]
        tl.store(codes + place, _code(rest * inverse), mask=inside)


@triton.jit
def _turn(codes, out, num_rows, num_columns, block: tl.constexpr):
    row = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64)
    column = (tl.program_id(1) * block + tl.arange(0, block)).to(tl.int64)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    tile = tl.load(codes + row[:, None] * num_columns + column[None, :], mask=inside)
    to = out + column[:, None] * num_rows + row[None, :]
    tl.store(to, tl.trans(tile), mask=(column < num_columns)[:, None] & (row < num_rows)[None, :])


def round_rows(parts: Sequence[Tensor], fold_1d: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of [parts * fold], (S, D) int8, and scales (S, 1), fp32. Parts (S, D_i) are bf16."""
    if len(parts) > _MOST_PARTS:
        parts = [torch.cat(list(parts), dim=1)]
    rows = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    missing = _MOST_PARTS - len(rows)
    sizes = [row.shape[1] for row in rows] + [0] * missing
    codes_sd = rows[0].new_empty(len(rows[0]), sum(sizes), dtype=torch.int8)
    scales_s1 = rows[0].new_empty(len(rows[0]), 1, dtype=torch.float32)
    _round[(len(codes_sd),)](
        *rows, *[rows[0]] * missing, *(row.stride(0) for row in rows), *[0] * missing,
        fold_1d, codes_sd, scales_s1,
        *sizes, *(triton.next_power_of_2(max(size, 1)) for size in sizes), _LARGEST, _LEAST,
        num_warps=4,
    )  # fmt: skip
    return codes_sd, scales_s1


def round_apart(
    x_sd: Tensor, inner_sr: Tensor, probe_md: Tensor, *, rows: int = _ROWS
) -> tuple[Tensor, Tensor]:
    """Codes of x - z V, (S, D) int8, and scales (S, 1), fp32.

    z are the last m columns of `inner` (S, R + m), V (m, D) is `probe`; these and x are bf16.
    """
    x_sd, inner_sr, probe_md = (
        t if t.stride(1) == 1 else t.contiguous() for t in (x_sd, inner_sr, probe_md)
    )
    codes_sd = x_sd.new_empty(x_sd.shape, dtype=torch.int8)
    scales_s1 = x_sd.new_empty(len(x_sd), 1, dtype=torch.float32)
    apart = len(probe_md)
    _round_apart[(triton.cdiv(len(x_sd), rows),)](
        x_sd, x_sd.stride(0), inner_sr, inner_sr.stride(0), probe_md, probe_md.stride(0),
        codes_sd, scales_s1, *x_sd.shape, inner_sr.shape[1], apart, triton.next_power_of_2(apart),
        rows, _COLUMNS, _LARGEST, _LEAST, num_warps=4,
    )  # fmt: skip
    return codes_sd, scales_s1


def turned(codes_od: Tensor) -> Tensor:
    """(D, O) of (O, D), contiguous."""
    out = codes_od.new_empty(codes_od.shape[1], codes_od.shape[0])
    grid = tuple(triton.cdiv(size, _TURNED) for size in codes_od.shape)
    _turn[grid](codes_od, out, *codes_od.shape, _TURNED, num_warps=8)
    return out
