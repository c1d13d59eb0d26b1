"""The kernels of `kernels/nf4_int8.py`: NF4 to int8, as it lies and transposed.

Two codes a byte, the first one in the high half (bitsandbytes); 64 codes share a maximum, which is
itself a code of 8 bits, in units of what 256 maxima share, less an offset of all.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from tunefork.kernels.int8_rows_triton import nearest
from tunefork.kernels.quantized import GROUP

_COLUMNS = 2048
"""Of a program's row."""
_TILE = (128, 64)
"""Rows and columns of the weight that a program turns."""


@triton.jit
def _pair(byte, largest, inverse, values):
    """The int8 codes of the two weights of a byte."""
    first = tl.load(values + (byte >> 4).to(tl.int32)) * largest
    second = tl.load(values + (byte & 15).to(tl.int32)) * largest
    # Through bf16, which is what the weight is kept for elsewhere.
    first = nearest(first.to(tl.bfloat16).to(tl.float32) * inverse)
    second = nearest(second.to(tl.bfloat16).to(tl.float32) * inverse)
    return first, second


@triton.jit
def _largest(maxima, place, outer, table, offset, mask, group: tl.constexpr):
    """The blocks' maxima."""
    code = tl.load(maxima + place, mask=mask, other=0).to(tl.int32)
    unit = tl.load(outer + place // group, mask=mask, other=0.0)
    return tl.load(table + code) * unit + tl.load(offset)


@triton.jit
def _codes(
    packed, maxima, outer, table, offset, inverse, values, out, features_in,
    block: tl.constexpr, group: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * columns
    pair = start // 2 + tl.arange(0, columns // 2)
    inside = pair < features_in // 2
    byte = tl.load(packed + row * (features_in // 2) + pair, mask=inside, other=0)
    place = row * (features_in // block) + pair // (block // 2)
    largest = _largest(maxima, place, outer, table, offset, inside, group)
    first, second = _pair(byte, largest, tl.load(inverse + row), values)
    column = start + tl.arange(0, columns)
    to = out + row * features_in + column
    tl.store(to, tl.interleave(first, second), mask=column < features_in)


@triton.jit
def _codes_turned(
    packed, maxima, outer, table, offset, inverse, values, out, stride, features_out, features_in,
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
    first, second = _pair(byte, largest, each[:, None], values)
    codes = tl.trans(tl.interleave(first, second))
    column = (start + tl.arange(0, columns)).to(tl.int64)
    kept = (column < features_in)[:, None] & has_row[None, :]
    tl.store(out + column[:, None] * stride + row[None, :], codes, mask=kept)


def launch(
    tensors: Sequence[Tensor], inverse_o: Tensor, values: Tensor, out_od: Tensor, *, block: int
) -> None:
    """Fill `out_od`, int8, contiguous, with the layers of `tensors`, one below the other.

    `tensors` are the `quantized.nf4_tensors` of each layer, `values` are NF4's 16, fp32, `inverse`
    that of the rows' scales. D is a multiple of `block`.
    """
    start, features_in = 0, out_od.shape[1]
    for own in _by_layer(tensors):
        size = 2 * own[0].numel() // features_in
        grid = (size, triton.cdiv(features_in, _COLUMNS))
        _codes[grid](
            *own, inverse_o[start:], values, out_od[start:],
            features_in, block, GROUP, _COLUMNS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        start += size


def launch_turned(
    tensors: Sequence[Tensor], inverse_o: Tensor, values: Tensor, out_do: Tensor, *, block: int
) -> None:
    """Fill `out_do` with the same, transposed."""
    start, features_in = 0, out_do.shape[0]
    for own in _by_layer(tensors):
        size = 2 * own[0].numel() // features_in
        grid = (triton.cdiv(size, _TILE[0]), triton.cdiv(features_in, _TILE[1]))
        _codes_turned[grid](
            *own, inverse_o[start:], values, out_do[:, start:], out_do.stride(0),
            size, features_in, block, GROUP, *_TILE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        start += size


def _by_layer(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [tensors[at : at + 5] for at in range(0, len(tensors), 5)]
