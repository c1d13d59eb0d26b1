"""The kernels of `kernels/bank_read.py` for prompts: own A for several layers, own B, added to y.

A tile is tokens of one slot, side by side. Where tiles are full, memory bounds them, by x and y.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunefork.kernels.bank_read_triton import blocks_of, own_b, piece, step_of


@triton.jit
def _down(
    x, stride_x, a, stride_a, u, stride_u, tiles, num_slots, features,
    num_columns: tl.constexpr, rank: tl.constexpr, is_even: tl.constexpr,
    block_t: tl.constexpr, block_k: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    slot, start, count = (
        tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    )  # fmt: skip
    if slot < 0:
        return
    at = tl.arange(0, block_t)
    mask_t = at < count
    token = (start + at).to(tl.int64)
    k = tl.program_id(1) * block_k + tl.arange(0, block_k)
    mask_k = k < num_columns
    row_a = ((k // rank) * num_slots + slot) * rank + k % rank
    d = tl.arange(0, block_d)
    x_at = x + token[:, None] * stride_x + d[None, :]
    a_at = a + row_a.to(tl.int64)[None, :] * stride_a + d[:, None]
    total = tl.zeros([block_t, block_k], tl.float32)
    for begin in range(0, features, block_d):
        mask_x, mask_a = mask_t[:, None], mask_k[None, :]
        if not is_even:
            mask_x = mask_x & (begin + d < features)[None, :]
            mask_a = mask_a & (begin + d < features)[:, None]
        x_td = tl.load(x_at + begin, mask=mask_x, other=0.0)
        a_dk = tl.load(a_at + begin, mask=mask_a, other=0.0)
        total = tl.dot(x_td, a_dk, total)
    tl.store(
        u + token[:, None] * stride_u + k[None, :], total.to(u.dtype.element_ty),
        mask=mask_t[:, None] & mask_k[None, :],
    )  # fmt: skip


@triton.jit
def _up(
    y, stride_y, u, stride_u, b, tiles, num_slots,
    sizes: tl.constexpr, rank: tl.constexpr, block_rank: tl.constexpr,
    block_t: tl.constexpr, block_o: tl.constexpr, step: tl.constexpr, begins: tl.constexpr,
):  # fmt: skip
    layer, column, first, size = piece(tl.program_id(0), sizes, block_o)
    tile = tl.program_id(1)
    slot, start, count = (
        tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    )  # fmt: skip
    is_done = count == 0  # a captured pass has as many tiles as any of its size may need
    if not begins:
        is_done = is_done | (slot < 0)
    if is_done:
        return
    column = tl.multiple_of(column, step)
    first, size = tl.multiple_of(first, step), tl.multiple_of(size, step)
    column = column + tl.arange(0, block_o)
    place = tl.arange(0, block_rank)
    mask_o, mask_r = column < size, (place < rank) & (slot >= 0)
    b_ro = own_b(b, slot, num_slots, column, first, size, mask_r, mask_o, rank, block_rank)
    at = tl.arange(0, block_t)
    mask_t = at < count
    token = (start + at).to(tl.int64)
    u_tr = tl.load(
        u + token[:, None] * stride_u + (layer * rank + place)[None, :],
        mask=mask_t[:, None] & mask_r[None, :], other=0.0,
    )  # fmt: skip
    y_at = y + token[:, None] * stride_y + (first + column)[None, :]
    mask = mask_t[:, None] & mask_o[None, :]
    y_to = tl.dot(u_tr, b_ro)
    if not begins:
        y_to = y_to + tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_at, y_to.to(y.dtype.element_ty), mask=mask)


@cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may take."""
    found = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(found["max_shared_mem"])


def down(x_sd: Tensor, a_kd: Tensor, tiles_t3: Tensor, tile: int, layers: int, rank: int) -> Tensor:
    """As `bank_read.down`."""
    columns, features = layers * rank, x_sd.shape[1]
    u_sk = x_sd.new_empty(x_sd.shape[0], columns)
    block_k, block_d = max(16, min(128, triton.next_power_of_2(columns))), 128
    grid = (tiles_t3.shape[0], triton.cdiv(columns, block_k))
    _down[grid](
        x_sd,
        x_sd.stride(0),
        a_kd,
        a_kd.stride(0),
        u_sk,
        u_sk.stride(0),
        tiles_t3,
        a_kd.shape[0] // columns,
        features,
        columns,
        rank,
        features % block_d == 0,
        tile,
        block_k,
        block_d,
        num_warps=4,
        num_stages=max(1, min(4, _shared_bytes(x_sd.device) // (2 * block_d * (tile + block_k)))),
    )
    return u_sk


def up(
    y_so: Tensor,
    u_sk: Tensor,
    b: Tensor,
    tiles_t3: Tensor,
    tile: int,
    sizes: Sequence[int],
    rank: int,
    *,
    begins: bool,
) -> None:
    """As `bank_read.up`."""
    block_rank = max(16, triton.next_power_of_2(rank))
    # Columns of B lie in registers: fewer for a large rank.
    block_o = max(16, min(128, 8192 // block_rank))
    _up[(blocks_of(sizes, block_o), tiles_t3.shape[0])](
        y_so,
        y_so.stride(0),
        u_sk,
        u_sk.stride(0),
        b,
        tiles_t3,
        b.numel() // (rank * sum(sizes)),
        tuple(sizes),
        rank,
        block_rank,
        tile,
        block_o,
        step_of(sizes),
        begins,
        num_warps=4,
    )
