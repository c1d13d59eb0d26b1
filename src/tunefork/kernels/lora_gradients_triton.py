"""The kernels of `kernels/lora_gradients.py`: both products with dy from one reading of it.

A program has a rectangle of dy, a block of columns for a stretch of rows, and takes it tile by tile
through shared memory, where both products read it. Its share of dB stays in registers until the
rows end; of each tile's du it writes what its columns give. A second kernel sums the shares of both
in a fixed order, so that the same bits come each time. Shares are small beside dy where rectangles
are large: written and read they are 4 R (1 / columns + 1 / rows) of its bytes (rank 16, of an 8B
model's layers: 14 to 38 %).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_SUM_VALUES = 256
"""Values that a program of the second kernel makes."""
_SUM_SHARES = 16
"""Shares that it reads at a time, at most."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """How dy is cut; one of `_BLOCKS` unless something is measured."""

    rows: int = 64
    """Of a tile; tensor cores take 64 at a time."""
    columns: int = 512
    """Of a program."""
    warps: int = 8
    stages: int = 3
    """Tiles in shared memory: one is multiplied, the others are on their way."""
    programs: int = 132
    """About so many: as many as a Hopper GPU has multiprocessors."""


_BLOCKS = {16: Blocks(), 32: Blocks(columns=256, warps=4, stages=5), 64: Blocks(stages=2)}
"""By the rank as the kernel has it, a power of two: no more than what registers (no spills) and
shared memory (227 KiB) hold. Measured on an H200, 16,384 x 4,096: rank 16 0.045 ms against 0.072 of
two products, 32 0.057 against 0.071, 64 0.081 against 0.076."""


@triton.jit(do_not_specialize=["num_rows", "rows_each"])
def _shares(
    dy, stride_dy, u, b, du_shares, db_shares, num_rows, rows_each, features,
    stride_u: tl.constexpr, stride_b: tl.constexpr, rank: tl.constexpr, block_r: tl.constexpr,
    block_s: tl.constexpr, block_o: tl.constexpr, is_whole: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * rows_each
    last = tl.minimum(first + rows_each, num_rows)
    column = tl.program_id(0) * block_o + tl.arange(0, block_o)
    row, place = tl.arange(0, block_s), tl.arange(0, block_r)
    mask_o, mask_r = column < features, place < rank
    mask_or = mask_o[:, None] & mask_r[None, :]
    b_or = tl.load(b + column[:, None] * stride_b + place[None, :], mask=mask_or, other=0.0)
    db_or = tl.zeros([block_o, block_r], tl.float32)
    start = first.to(tl.int64)
    dy += start * stride_dy
    u += start * stride_u
    du_shares += (tl.program_id(0).to(tl.int64) * num_rows + start) * rank
    dy_at = row[:, None] * stride_dy + column[None, :]
    u_at = row[:, None] * stride_u + place[None, :]
    du_at = row[:, None] * rank + place[None, :]
    for begin in range(first, last, block_s):
        mask_s = (begin + row < last)[:, None]
        mask_so, mask_sr = mask_s, mask_s & mask_r[None, :]
        if not is_whole:
            mask_so = mask_so & mask_o[None, :]
        dy_so = tl.load(dy + dy_at, mask=mask_so, other=0.0)
        u_sr = tl.load(u + u_at, mask=mask_sr, other=0.0)
        # In this order both are in flight at once; in the other ptxas has each wait (C7515).
        db_or = tl.dot(tl.trans(dy_so), u_sr, db_or)
        du_sr = tl.dot(dy_so, b_or)
        tl.store(du_shares + du_at, du_sr, mask=mask_sr)
        dy += block_s * stride_dy
        u += block_s * stride_u
        du_shares += block_s * rank
    db_shares += tl.program_id(1).to(tl.int64) * features * rank
    tl.store(db_shares + column[:, None] * rank + place[None, :], db_or, mask=mask_or)


@triton.jit
def sum_shares(
    shares, num_shares, size, begin, scale, block_n: tl.constexpr, block_k: tl.constexpr
):
    """`scale` times the sum of the shares, `size` values each, of those from `begin` on."""
    at, share = begin + tl.arange(0, block_n), tl.arange(0, block_k)
    total = tl.zeros([block_n], tl.float32)
    for done in range(0, num_shares, block_k):
        mask = (done + share < num_shares)[:, None] & (at < size)[None, :]
        from_at = (done + share).to(tl.int64)[:, None] * size + at[None, :]
        total += tl.sum(tl.load(shares + from_at, mask=mask, other=0.0), axis=0)
    return total * scale


@triton.jit(do_not_specialize=["num_rows", "features", "du_blocks", "num_du", "num_db"])
def _add(
    du_shares, db_shares, du, db, num_rows, features, du_blocks, num_du, num_db, scale,
    stride_du: tl.constexpr, rank: tl.constexpr, block_n: tl.constexpr,
    block_du: tl.constexpr, block_db: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    at = tl.arange(0, block_n)
    if block < du_blocks:
        begin, size = block.to(tl.int64) * block_n, num_rows.to(tl.int64) * rank
        total = sum_shares(du_shares, num_du, size, begin, scale, block_n, block_du)
        row, place = (begin + at) // rank, (begin + at) % rank
        tl.store(
            du + row * stride_du + place, total.to(du.dtype.element_ty), mask=begin + at < size
        )
    else:
        begin, size = (block - du_blocks).to(tl.int64) * block_n, features.to(tl.int64) * rank
        total = sum_shares(db_shares, num_db, size, begin, scale, block_n, block_db)
        tl.store(db + begin + at, total.to(db.dtype.element_ty), mask=begin + at < size)


def launch(
    dys: Sequence[Tensor],
    u_sr: Tensor,
    lora_b: Sequence[Tensor],
    scale: float,
    blocks: Blocks | None = None,
) -> list[Tensor]:
    """du (S, R), and each layer's gradient of B, as `lora_gradients.lora_gradients` says.

    All in bf16, ranks up to 64.
    """
    du_sr, db = torch.empty(u_sr.shape, dtype=u_sr.dtype, device=u_sr.device), []
    first = 0
    for dy, b in zip(dys, lora_b, strict=True):
        last = first + b.shape[1]
        db.append(_launch_one(dy, u_sr[:, first:last], b, du_sr[:, first:last], scale, blocks))
        first = last
    return [du_sr, *db]


def _launch_one(
    dy_so: Tensor, u_sr: Tensor, b_or: Tensor, du_sr: Tensor, scale: float, blocks: Blocks | None
) -> Tensor:
    """Of one layer: fills `du_sr` and returns B's gradient."""
    dy_so, u_sr, b_or = (t if t.stride(1) == 1 else t.contiguous() for t in (dy_so, u_sr, b_or))
    (tokens, features), rank = dy_so.shape, b_or.shape[1]
    block_r = max(16, triton.next_power_of_2(rank))
    blocks = blocks or _BLOCKS[block_r]
    du_shares, db_shares, rows_each = new_shares(dy_so, rank, blocks)
    db_or = torch.empty(features, rank, dtype=b_or.dtype, device=b_or.device)
    _shares[(len(du_shares), len(db_shares))](
        dy_so,
        dy_so.stride(0),
        u_sr,
        b_or,
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
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    add_shares(du_shares, db_shares, du_sr, db_or, scale)
    return db_or


def new_shares(dy_so: Tensor, rank: int, blocks: Blocks) -> tuple[Tensor, Tensor, int]:
    """Room for the shares of du, (blocks across, S, R) fp32, and of dB, (blocks down, O, R), and
    the rows of a block: a multiple of a tile's."""
    tokens, features = dy_so.shape
    across = triton.cdiv(features, blocks.columns)
    rows_each = triton.cdiv(tokens, max(1, blocks.programs // across))
    rows_each = triton.cdiv(rows_each, blocks.rows) * blocks.rows
    down = triton.cdiv(tokens, rows_each)
    return (
        dy_so.new_empty(across, tokens, rank, dtype=torch.float32),
        dy_so.new_empty(down, features, rank, dtype=torch.float32),
        rows_each,
    )


def add_shares(
    du_shares: Tensor, db_shares: Tensor, du_sr: Tensor, db_or: Tensor, scale: float
) -> None:
    """Fill `du` and `db`, which is contiguous, with `scale` times the sums of their shares."""
    (across, tokens, rank), (down, features, _) = du_shares.shape, db_shares.shape
    du_blocks = triton.cdiv(tokens * rank, _SUM_VALUES)
    _add[(du_blocks + triton.cdiv(features * rank, _SUM_VALUES),)](
        du_shares,
        db_shares,
        du_sr,
        db_or,
        tokens,
        features,
        du_blocks,
        across,
        down,
        scale,
        du_sr.stride(0),
        rank,
        _SUM_VALUES,
        min(_SUM_SHARES, triton.next_power_of_2(across)),
        min(_SUM_SHARES, triton.next_power_of_2(down)),
    )
