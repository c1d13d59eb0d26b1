"""The kernel of `kernels/bank_swiglu.py`: gate's and up's own B, and what SwiGLU makes of both.

As `_add_own` in `bank_read_triton.py`, with two layers' columns in one program, and with rows that
have no slot, which are a slot of their own here: they too are to be written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunefork.kernels.bank_read_triton import CHUNK, FEW, next_row


@triton.jit
def _silu_times(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _swiglu_own(
    y, stride_y, u, stride_u, slots, b, out, num_rows, num_slots,
    size: tl.constexpr, rank: tl.constexpr, block_rank: tl.constexpr,
    block_o: tl.constexpr, block_m: tl.constexpr, block_rows: tl.constexpr,
    few: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * block_o
    slot = tl.program_id(1)  # the last: none
    place, row = tl.arange(0, block_rank), tl.arange(0, block_rows)
    mask_r = (place < rank) & (slot < num_slots)
    own = tl.load(slots + row, mask=row < num_rows, other=num_slots + 1)
    is_mine = tl.where(own < 0, num_slots, own) == slot
    count = tl.sum(is_mine.to(tl.int32), axis=0)
    u_up = u + (num_slots + slot) * rank
    u += slot * rank
    b += (slot * rank).to(tl.int64) * size
    b_up = b + (num_slots * rank).to(tl.int64) * size
    if count > few:
        number = tl.arange(0, chunk)
        for done in range(0, count, chunk):
            mask_s, at = done + number < count, tl.zeros([chunk], tl.int32)
            for turn in range(chunk):
                found, is_mine = next_row(is_mine, row)
                at = tl.where(number == turn, found, at)
            at = tl.where(mask_s, at, 0)
            u_at = at[:, None] * stride_u + place[None, :]
            mask_u = mask_s[:, None] & mask_r[None, :]
            gate_u = tl.load(u + u_at, mask=mask_u, other=0.0)
            up_u = tl.load(u_up + u_at, mask=mask_u, other=0.0)
            for part in range(0, block_o, block_m):
                column = begin + part + tl.arange(0, block_m)
                mask_b = mask_r[:, None] & (column < size)[None, :]
                b_at = place[:, None] * size + column[None, :]
                y_at = y + at[:, None] * stride_y + column[None, :]
                mask = mask_s[:, None] & (column < size)[None, :]
                gate = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
                gate += tl.dot(gate_u, tl.load(b + b_at, mask=mask_b, other=0.0))
                up = tl.load(y_at + size, mask=mask, other=0.0).to(tl.float32)
                up += tl.dot(up_u, tl.load(b_up + b_at, mask=mask_b, other=0.0))
                h = _silu_times(gate, up).to(out.dtype.element_ty)
                tl.store(out + at[:, None] * size + column[None, :], h, mask=mask)
    elif count > 0:
        column = begin + tl.arange(0, block_o)
        mask_o = column < size
        mask_b = mask_r[:, None] & mask_o[None, :]
        b_at = place[:, None] * size + column[None, :]
        gate_b = tl.load(b + b_at, mask=mask_b, other=0.0)
        up_b = tl.load(b_up + b_at, mask=mask_b, other=0.0)
        for _ in range(count):
            found, is_mine = next_row(is_mine, row)
            gate_u = tl.load(u + found * stride_u + place, mask=mask_r, other=0.0).to(tl.float32)
            up_u = tl.load(u_up + found * stride_u + place, mask=mask_r, other=0.0).to(tl.float32)
            y_at = y + found * stride_y + column
            gate = tl.load(y_at, mask=mask_o, other=0.0).to(tl.float32)
            up = tl.load(y_at + size, mask=mask_o, other=0.0).to(tl.float32)
            gate += tl.sum(gate_b.to(tl.float32) * gate_u[:, None], axis=0)
            up += tl.sum(up_b.to(tl.float32) * up_u[:, None], axis=0)
            h = _silu_times(gate, up).to(out.dtype.element_ty)
            tl.store(out + found * size + column, h, mask=mask_o)


def swiglu_own(
    y_so: Tensor,
    u_sk: Tensor,
    slot_s: Tensor,
    b: Tensor,
    rank: int,
    *,
    most: int = 2048,
    num_warps: int = 1,
) -> Tensor:
    """As `bank_swiglu.swiglu_own`."""
    rows, size = y_so.shape[0], y_so.shape[1] // 2
    num_slots = b.numel() // (2 * rank * size)
    block_rank = max(16, triton.next_power_of_2(rank))
    block_o = max(16, most // block_rank)
    out_sf = torch.empty(rows, size, dtype=y_so.dtype, device=y_so.device)
    _swiglu_own[(triton.cdiv(size, block_o), num_slots + 1)](
        y_so,
        y_so.stride(0),
        u_sk,
        u_sk.stride(0),
        slot_s,
        b,
        out_sf,
        rows,
        num_slots,
        size,
        rank,
        block_rank,
        block_o,
        min(block_o, 32),
        triton.next_power_of_2(rows),
        FEW,
        CHUNK,
        num_warps=num_warps,
    )
    return out_sf
