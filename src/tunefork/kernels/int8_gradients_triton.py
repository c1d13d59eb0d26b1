"""The kernels of `kernels/int8_gradients.py`: codes, du and B's gradient from one reading of dy.

The first goes over dy as `lora_gradients_triton.py` does, whose shares it leaves to be summed. A
tile that is in shared memory for the products is there for its codes too: scaled, it is written
into the wide operand at the layer's own columns. No code exceeds 127 and none is cut off: over a
scale that is its row's largest magnitude / 127, four roundings of fp32 are what a number may be
above 127 by, far less than the half that would take it further.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tunefork.kernels.int8_rows_triton import nearest
from tunefork.kernels.lora_gradients_triton import Blocks, add_shares, new_shares


@dataclass(frozen=True, slots=True)
class Tiling:
    """How dy is cut, and how its codes are written."""

    blocks: Blocks
    codes: int = 16
    """That a thread writes at once. It reads as many numbers of a tile: 16 bytes with 8, and with
    16 twice as many, in two halves, which takes fewer registers."""


_TILINGS = {16: Tiling(Blocks(stages=4)), 32: Tiling(Blocks())}
"""By the rank as the kernel has it, a power of two: no more than what registers (no spills) and
shared memory (227 KiB) hold. On an H200 two layers of 14,336 and 16,384 tokens take 0.45 ms, where
codes alone take 0.49, and du and B's gradient alone 0.42. Rank 16's was the quickest of twelve when
codes were 8-bit floats; a tile by each thread's copies of its part, not the hardware's (TMA), took
a sixth longer."""
_SIMPLE = 8, 1024
"""Rows and columns of a program that makes codes alone."""


@triton.jit(do_not_specialize=["num_rows", "rows_each"])
def _gradients(
    dy, u, b, fold, inverse, codes, stride_codes, du_shares, db_shares,
    num_rows, rows_each, features,
    stride_u: tl.constexpr, stride_b: tl.constexpr, rank: tl.constexpr, block_r: tl.constexpr,
    block_s: tl.constexpr, block_o: tl.constexpr, is_whole: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * rows_each
    last = tl.minimum(first + rows_each, num_rows)
    column = tl.program_id(0) * block_o + tl.arange(0, block_o)
    row, place = tl.arange(0, block_s), tl.arange(0, block_r)
    mask_o, mask_r = column < features, place < rank
    mask_or = mask_o[:, None] & mask_r[None, :]
    b_or = tl.load(b + column[:, None] * stride_b + place[None, :], mask=mask_or, other=0.0)
    fold_o = tl.load(fold + column, mask=mask_o, other=0.0)
    db_or = tl.zeros([block_o, block_r], tl.float32)
    start = first.to(tl.int64)
    u += start * stride_u
    inverse += start
    codes += start * stride_codes
    du_shares += (tl.program_id(0).to(tl.int64) * num_rows + start) * rank
    u_at = row[:, None] * stride_u + place[None, :]
    du_at = row[:, None] * rank + place[None, :]
    # Said to be multiples of no more than `at_once`, codes have dy's own layout of threads.
    codes_at = tl.multiple_of(row[:, None] * stride_codes + column[None, :], [1, at_once])
    for begin in range(first, last, block_s):
        mask_s = (begin + row < last)[:, None]
        mask_so, mask_sr = mask_s, mask_s & mask_r[None, :]
        if not is_whole:
            mask_so = mask_so & mask_o[None, :]
        # No product's operand, so not fetched ahead: it comes while the tile is waited for.
        inverse_s = tl.load(inverse + row, mask=begin + row < last, other=0.0)
        dy_so = dy.load([begin, tl.program_id(0) * block_o])
        u_sr = tl.load(u + u_at, mask=mask_sr, other=0.0)
        # In this order both are in flight at once; in the other ptxas has each wait (C7515).
        db_or = tl.dot(tl.trans(dy_so), u_sr, db_or)
        du_sr = tl.dot(dy_so, b_or)
        scaled = dy_so.to(tl.float32) * fold_o[None, :] * inverse_s[:, None]
        tl.store(codes + codes_at, nearest(scaled), mask=mask_so)
        tl.store(du_shares + du_at, du_sr, mask=mask_sr)
        u += block_s * stride_u
        inverse += block_s
        codes += block_s * stride_codes
        du_shares += block_s * rank
    db_shares += tl.program_id(1).to(tl.int64) * features * rank
    tl.store(db_shares + column[:, None] * rank + place[None, :], db_or, mask=mask_or)


@triton.jit(do_not_specialize=["num_rows"])
def _codes(
    dy, stride_dy, fold, inverse, codes, stride_codes, num_rows, features,
    block_s: tl.constexpr, block_o: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(features, block_o)
    above = (tl.program_id(0) // across * block_s).to(tl.int64)
    row = above + tl.arange(0, block_s)
    column = tl.program_id(0) % across * block_o + tl.arange(0, block_o)
    mask_s, mask_o = row < num_rows, column < features
    inside = mask_s[:, None] & mask_o[None, :]
    dy_so = tl.load(dy + row[:, None] * stride_dy + column[None, :], mask=inside, other=0.0)
    fold_o = tl.load(fold + column, mask=mask_o, other=0.0)
    inverse_s = tl.load(inverse + row, mask=mask_s, other=0.0)
    scaled = dy_so.to(tl.float32) * fold_o[None, :] * inverse_s[:, None]
    at = row[:, None] * stride_codes + column[None, :]
    tl.store(codes + at, nearest(scaled), mask=inside)


def launch(
    dys: Sequence[Tensor],
    u_sr: Tensor,
    lora_b: Sequence[Tensor],
    lora_scale: float,
    fold_1o: Tensor,
    inverse_s1: Tensor,
    codes: Tensor,
    tilings: dict[int, Tiling] | None = None,
) -> list[Tensor]:
    """du (S, R) and each layer's gradient of B; fills `codes` (S, O), which are contiguous.

    As `int8_gradients.gradient_codes` says, with the inverse of its scale, contiguous. All but that
    and fold are in bf16, ranks up to 32; O_i are multiples of 16.
    """
    du_sr, db = torch.empty(u_sr.shape, dtype=u_sr.dtype, device=u_sr.device), []
    fold_1o = fold_1o.contiguous()
    first, left = 0, 0
    for dy, b in zip(dys, lora_b, strict=True):
        last, right = first + b.shape[1], left + b.shape[0]
        columns = fold_1o[:, left:right], inverse_s1, codes[:, left:right]
        us = u_sr[:, first:last], du_sr[:, first:last]
        db.append(_launch_one(dy, *us, b, lora_scale, *columns, tilings or _TILINGS))
        first, left = last, right
    return [du_sr, *db]


def _launch_one(
    dy_so: Tensor,
    u_sr: Tensor,
    du_sr: Tensor,
    b_or: Tensor,
    lora_scale: float,
    fold_1o: Tensor,
    inverse_s1: Tensor,
    codes: Tensor,
    tilings: dict[int, Tiling],
) -> Tensor:
    """Of one layer: fills `du_sr` and its columns of codes, and returns B's gradient."""
    dy_so, u_sr, b_or = (t if t.stride(1) == 1 else t.contiguous() for t in (dy_so, u_sr, b_or))
    (tokens, features), rank = dy_so.shape, b_or.shape[1]
    block_r = max(16, triton.next_power_of_2(rank))
    tiling = tilings[block_r]
    blocks = tiling.blocks
    du_shares, db_shares, rows_each = new_shares(dy_so, rank, blocks)
    db_or = torch.empty(features, rank, dtype=b_or.dtype, device=b_or.device)
    _gradients[(len(du_shares), len(db_shares))](
        TensorDescriptor.from_tensor(dy_so, [blocks.rows, blocks.columns]),
        u_sr,
        b_or,
        fold_1o,
        inverse_s1,
        codes,
        codes.stride(0),
        du_shares,
        db_shares,
        tokens,
        rows_each,
        features,
        u_sr.stride(0),
        b_or.stride(0),
        rank,
        block_r,
        blocks.rows,
        blocks.columns,
        features % blocks.columns == 0,
        tiling.codes,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    add_shares(du_shares, db_shares, du_sr, db_or, lora_scale)
    return db_or


def simple_codes(dys: Sequence[Tensor], fold_1o: Tensor, inverse_s1: Tensor, codes: Tensor) -> None:
    """Fill `codes` (S, O), contiguous, from dy of any sizes and strides."""
    fold_1o, left = fold_1o.contiguous(), 0
    rows, columns = _SIMPLE
    for dy in dys:
        dy_so = dy if dy.stride(1) == 1 else dy.contiguous()
        tokens, features = dy_so.shape
        _codes[(triton.cdiv(tokens, rows) * triton.cdiv(features, columns),)](
            dy_so,
            dy_so.stride(0),
            fold_1o[:, left : left + features],
            inverse_s1,
            codes[:, left : left + features],
            codes.stride(0),
            tokens,
            features,
            rows,
            columns,
        )
        left += features
