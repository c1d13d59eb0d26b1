"""The kernels of `kernels/nf4_e4m3.py`: NF4 to e4m3, as it lies and transposed.

Two codes a byte, the first one in the high half (bitsandbytes); 64 codes share a maximum, which is
itself a code of 8 bits, in units of what 256 maxima share, less an offset of all.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from tunefork.kernels.adamw_triton import mix
from tunefork.kernels.quantized import GROUP

_COLUMNS = 2048
"""Of a program's row."""
_TILE = (128, 64)
"""Rows and columns of the weight that a program turns."""


@triton.jit
def _units(byte, largest, inverse, values):
    """The two weights of a byte, fp32 in units of their row's scale."""
    first = tl.load(values + (byte >> 4).to(tl.int32)) * largest
    second = tl.load(values + (byte & 15).to(tl.int32)) * largest
    # Through bf16, which is what the weight is kept for elsewhere.
    first = first.to(tl.bfloat16).to(tl.float32) * inverse
    second = second.to(tl.bfloat16).to(tl.float32) * inverse
    return first, second


@triton.jit
def _at_random(units, bits):
    """`nf4_e4m3.rounded_at_random`, fp32, by the lower 16 bits."""
    noise = (bits & 0xFFFF).to(tl.float32) * 0.0000152587890625  # 2**-16
    word = units.to(tl.int32, bitcast=True)
    exponent = tl.maximum(word >> 23 & 0xFF, 121)
    step = (exponent - 3 << 23).to(tl.float32, bitcast=True)
    per_step = (257 - exponent << 23).to(tl.float32, bitcast=True)
    magnitude = tl.minimum(tl.floor(tl.abs(units) * per_step + noise) * step, 448.0)
    # With its sign, a zero's too.
    return (magnitude.to(tl.int32, bitcast=True) | word >> 31 << 31).to(tl.float32, bitcast=True)


@triton.jit
def _largest(maxima, place, outer, table, offset, mask, group: tl.constexpr):
    """The blocks' maxima."""
    code = tl.load(maxima + place, mask=mask, other=0).to(tl.int32)
    unit = tl.load(outer + place // group, mask=mask, other=0.0)
    return tl.load(table + code) * unit + tl.load(offset)


@triton.jit(do_not_specialize=["first_row"])
def _codes(
    packed, maxima, outer, table, offset, inverse, values, seed, out, stride, first_row,
    features_in,
    block: tl.constexpr, group: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * columns
    pair = start // 2 + tl.arange(0, columns // 2)
    inside = pair < features_in // 2
    byte = tl.load(packed + row * (features_in // 2) + pair, mask=inside, other=0)
    place = row * (features_in // block) + pair // (block // 2)
    largest = _largest(maxima, place, outer, table, offset, inside, group)
    first, second = _units(byte, largest, tl.load(inverse + row), values)
    number = (row + first_row) * (features_in // 2) + pair
    bits = mix(number.to(tl.uint32) ^ tl.load(seed + 1).to(tl.uint32, bitcast=True))
    first, second = _at_random(first, bits), _at_random(second, bits >> 16)
    codes = tl.interleave(first, second).to(tl.float8e4nv)
    column = start + tl.arange(0, columns)
    tl.store(out + row * stride + column, codes, mask=column < features_in)


@triton.jit(do_not_specialize=["first_row"])
def _codes_turned(
    packed, maxima, outer, table, offset, inverse, values, seed, out, stride, first_row,
    features_out, features_in,
    block: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
    start = tl.program_id(1) * columns
    pair = start // 2 + tl.arange(0, columns // 2)
    has_row = row < features_out
    inside = has_row[:, None] & (pair < features_in // 2)[None, :]
    byte = tl.load(packed + row[:, None] * (features_in // 2) + pair[None, :], mask=inside, other=0)
    place = row[:, None] * (features_in // block) + (pair // (block // 2))[None, :]
    largest = _largest(maxima, place, outer, table, offset, inside, group)
    each = tl.load(inverse + row, mask=has_row, other=0.0)
    first, second = _units(byte, largest, each[:, None], values)
    number = (row + first_row)[:, None] * (features_in // 2) + pair[None, :]
    bits = mix(number.to(tl.uint32) ^ tl.load(seed).to(tl.uint32, bitcast=True))
    first, second = _at_random(first, bits), _at_random(second, bits >> 16)
    codes = tl.trans(tl.interleave(first, second).to(tl.float8e4nv))
    column = (start + tl.arange(0, columns)).to(tl.int64)
    kept = (column < features_in)[:, None] & has_row[None, :]
    tl.store(out + column[:, None] * stride + row[None, :], codes, mask=kept)


def launch(
    tensors: Sequence[Tensor],
    inverse_o: Tensor,
    values: Tensor,
    seed: Tensor,
    out_op: Tensor,
    *,
    features_in: int,
    block: int,
) -> None:
    """Fill the first D columns of `out_op` with the layers of `tensors`, one below the other.

    `tensors` are the `quantized.nf4_tensors` of each layer, `values` are NF4's 16, fp32, `inverse`
    that of the rows' scales, `seed` as of `Nf4Rows`. D is a multiple of `block`.
    """
    start = 0
    for own in _by_layer(tensors):
        size = 2 * own[0].numel() // features_in
        grid = (size, triton.cdiv(features_in, _COLUMNS))
        _codes[grid](
            *own, inverse_o[start:], values, seed, out_op[start:], out_op.stride(0), start,
            features_in, block, GROUP, _COLUMNS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        start += size


def launch_turned(
    tensors: Sequence[Tensor],
    inverse_o: Tensor,
    values: Tensor,
    seed: Tensor,
    out_dp: Tensor,
    *,
    features_in: int,
    block: int,
) -> None:
    """Fill the first O columns of `out_dp` with another draw, transposed."""
    start = 0
    for own in _by_layer(tensors):
        size = 2 * own[0].numel() // features_in
        grid = (triton.cdiv(size, _TILE[0]), triton.cdiv(features_in, _TILE[1]))
        _codes_turned[grid](
            *own, inverse_o[start:], values, seed, out_dp[:, start:], out_dp.stride(0), start,
            size, features_in, block, GROUP, *_TILE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        start += size


def _by_layer(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [tensors[at : at + 5] for at in range(0, len(tensors), 5)]
