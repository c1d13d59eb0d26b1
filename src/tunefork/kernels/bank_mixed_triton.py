"""The kernel of `kernels/bank_mixed.py` for prompts: own B for several layers, added to y.

As `up` of `bank_tiles_triton.py`, but u is of all slots, and most tiles of a captured pass are
none: so there are as many programs as tiles would be if all were full, and each takes one after the
other until it comes to one that is none.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from tunefork.kernels.bank_read_triton import blocks_of, own_b, piece, step_of


@triton.jit(do_not_specialize=["num_tiles"])
def _up(
    y, stride_y, u, stride_u, b, tiles, num_tiles, num_slots,
    sizes: tl.constexpr, rank: tl.constexpr, block_rank: tl.constexpr,
    block_t: tl.constexpr, block_o: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    layer, column, first, size = piece(tl.program_id(0), sizes, block_o)
    column = tl.multiple_of(column, step)
    first, size = tl.multiple_of(first, step), tl.multiple_of(size, step)
    column = column + tl.arange(0, block_o)
    place, at = tl.arange(0, block_rank), tl.arange(0, block_t)
    mask_o, mask_r = column < size, place < rank
    tile = tl.program_id(1)
    count = tl.load(tiles + 3 * tile + 2)
    while count > 0:
        slot, start = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
        b_ro = own_b(b, slot, num_slots, column, first, size, mask_r, mask_o, rank, block_rank)
        mask_t, token = at < count, (start + at).to(tl.int64)
        column_u = (layer * num_slots + slot) * rank + place
        u_tr = tl.load(
            u + token[:, None] * stride_u + column_u[None, :],
            mask=mask_t[:, None] & mask_r[None, :], other=0.0,
        )  # fmt: skip
        y_at = y + token[:, None] * stride_y + (first + column)[None, :]
        mask = mask_t[:, None] & mask_o[None, :]
        y_to = tl.load(y_at, mask=mask, other=0.0).to(tl.float32) + tl.dot(u_tr, b_ro)
        tl.store(y_at, y_to.to(y.dtype.element_ty), mask=mask)
        tile += tl.num_programs(1)
        count = tl.load(tiles + 3 * tile + 2, mask=tile < num_tiles, other=0)


def up(
    y_so: Tensor,
    u_sk: Tensor,
    b: Tensor,
    tiles_t3: Tensor,
    tile: int,
    sizes: Sequence[int],
    rank: int,
) -> None:
    """As `bank_read.up`, of tiles that have a slot; u (S, L N R) is of all slots."""
    block_rank = max(16, triton.next_power_of_2(rank))
    # Columns of B lie in registers: fewer for a large rank.
    block_o = max(16, min(128, 8192 // block_rank))
    num_tiles = tiles_t3.shape[0]
    _up[(blocks_of(sizes, block_o), min(num_tiles, triton.cdiv(y_so.shape[0], tile)))](
        y_so,
        y_so.stride(0),
        u_sk,
        u_sk.stride(0),
        b,
        tiles_t3,
        num_tiles,
        b.numel() // (rank * sum(sizes)),
        tuple(sizes),
        rank,
        block_rank,
        tile,
        block_o,
        step_of(sizes),
        num_warps=4,
    )
