"""The kernel of `kernels/bank_read.py` for rows that decode: own B for several layers, added to y.

It is bound by memory, by B. So a program has one slot and a piece of its columns, and takes the
rows of that slot from wherever they lie. Kernels for prompts are in `bank_tiles_triton.py`.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 16
"""Rows that tensor cores multiply at a time: the fewest."""
_FEW = 2
"""Rows of a slot that are added to without tensor cores, at once: two are written out."""
_ROWS = 64
"""Up to so many rows are looked through by one form, which compiles once for all graphs."""
_VALUES = 2048
"""Of B that a warp holds."""
_NONE = tl.constexpr(2**31 - 1)
"""Behind any row."""


@triton.jit
def piece(block, sizes: tl.constexpr, block_o: tl.constexpr):
    """Of layers side by side, cut into blocks that none of them shares: the block's layer, the
    first of its columns, where its layer begins, and the layer's size."""
    layer, first = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    size = tl.full([], sizes[0], tl.int32)
    for at in tl.static_range(len(sizes) - 1):
        blocks = (sizes[at] + block_o - 1) // block_o
        is_behind = (layer == at) & (block >= blocks)
        block = tl.where(is_behind, block - blocks, block)
        first = tl.where(is_behind, first + sizes[at], first)
        size = tl.where(is_behind, sizes[at + 1], size)
        layer = tl.where(is_behind, at + 1, layer)
    return layer, block * block_o, first, size


@triton.jit
def own_b(b, slot, num_slots, column, first, size, mask_r, mask_o, rank: tl.constexpr,
           block_rank: tl.constexpr):  # fmt: skip
    """(block_rank, block_o) of a slot's B: layer after layer, each (N, R, O_i)."""
    place = tl.arange(0, block_rank)
    begin = first.to(tl.int64) * num_slots * rank + (slot * rank).to(tl.int64) * size
    at = begin + place[:, None] * size + column[None, :]
    return tl.load(b + at, mask=mask_r[:, None] & mask_o[None, :], other=0.0)


@triton.jit
def _next(is_mine, row):
    """The first of the rows, or `_NONE`, and the others."""
    at = tl.min(tl.where(is_mine, row, _NONE), axis=0)
    return at, is_mine & (row > at)


@triton.jit
def _added(y_o, b_ro, u_r):
    """y + u B, summed in fp32, in y's dtype."""
    sum_o = tl.sum(b_ro.to(tl.float32) * u_r.to(tl.float32)[:, None], axis=0)
    return (y_o.to(tl.float32) + sum_o).to(y_o.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _add_own(
    y, stride_y, u, stride_u, slots, b, num_rows, num_slots,
    sizes: tl.constexpr, rank: tl.constexpr, block_rank: tl.constexpr,
    block_o: tl.constexpr, block_m: tl.constexpr, block_rows: tl.constexpr, step: tl.constexpr,
    few: tl.constexpr, chunk: tl.constexpr, is_early: tl.constexpr,
):  # fmt: skip
    tl.static_assert(few <= 2)
    layer, begin, first, size = piece(tl.program_id(0), sizes, block_o)
    slot = tl.program_id(1)
    begin, first = tl.multiple_of(begin, step), tl.multiple_of(first, step)
    size = tl.multiple_of(size, step)
    place, row = tl.arange(0, block_rank), tl.arange(0, block_rows)
    mask_r = place < rank
    is_mine = tl.load(slots + row, mask=row < num_rows, other=-1) == slot
    count = tl.sum(is_mine.to(tl.int32), axis=0)
    u += (layer * num_slots + slot) * rank
    y += first
    if count > few:  # by tensor cores, so many rows at a time
        if is_early:
            tl.extra.cuda.gdc_wait()
        number = tl.arange(0, chunk)
        for done in range(0, count, chunk):
            mask_s, at = done + number < count, tl.zeros([chunk], tl.int32)
            for turn in range(chunk):
                found, is_mine = _next(is_mine, row)
                at = tl.where(number == turn, found, at)
            at = tl.where(mask_s, at, 0)
            u_at = u + at[:, None] * stride_u + place[None, :]
            u_sr = tl.load(u_at, mask=mask_s[:, None] & mask_r[None, :], other=0.0)
            for part in range(0, block_o, block_m):
                column = begin + part + tl.arange(0, block_m)
                mask_o = column < size
                b_ro = own_b(
                    b, slot, num_slots, column, first, size, mask_r, mask_o, rank, block_rank
                )
                y_at = y + at[:, None] * stride_y + column[None, :]
                mask = mask_s[:, None] & mask_o[None, :]
                y_so = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
                y_so = y_so + tl.dot(u_sr, b_ro)
                tl.store(y_at, y_so.to(y.dtype.element_ty), mask=mask)
    elif count > 0:  # by sums that stay within a thread
        column = begin + tl.arange(0, block_o)
        mask_o = column < size
        b_ro = own_b(b, slot, num_slots, column, first, size, mask_r, mask_o, rank, block_rank)
        if is_early:
            tl.extra.cuda.gdc_wait()
        one, is_mine = _next(is_mine, row)
        two, is_mine = _next(is_mine, row)
        has_two = two < _NONE
        two = tl.where(has_two, two, one)
        u_one = tl.load(u + one * stride_u + place, mask=mask_r, other=0.0)
        u_two = tl.load(u + two * stride_u + place, mask=mask_r, other=0.0)
        at_one, at_two = y + one * stride_y + column, y + two * stride_y + column
        y_one = tl.load(at_one, mask=mask_o, other=0.0)
        y_two = tl.load(at_two, mask=mask_o, other=0.0)
        tl.store(at_one, _added(y_one, b_ro, u_one), mask=mask_o)
        tl.store(at_two, _added(y_two, b_ro, u_two), mask=mask_o & has_two)
    elif is_early:  # or what comes next would be told that the kernel before has ended
        tl.extra.cuda.gdc_wait()


def step_of(sizes: Sequence[int]) -> int:
    """What every layer's first column is a multiple of, up to what one thread loads at once."""
    return next(step for step in (16, 8, 4, 2, 1) if not any(size % step for size in sizes))


def blocks_of(sizes: Sequence[int], block_o: int) -> int:
    return sum(triton.cdiv(size, block_o) for size in sizes)


@cache
def _can_be_early(device: torch.device) -> bool:
    """Whether a kernel can begin while the one before ends (programmatic dependent launch)."""
    return torch.cuda.get_device_capability(device)[0] >= 9


def add_own(
    y_so: Tensor, u_sk: Tensor, slot_s: Tensor, b: Tensor, sizes: Sequence[int], rank: int
) -> None:
    """As `bank_read.add_own`."""
    num_slots = b.numel() // (rank * sum(sizes))
    block_rank = max(16, triton.next_power_of_2(rank))
    block_o = max(16, _VALUES // block_rank)
    is_early = _can_be_early(y_so.device)
    _add_own[(blocks_of(sizes, block_o), num_slots)](
        y_so,
        y_so.stride(0),
        u_sk,
        u_sk.stride(0),
        slot_s,
        b,
        y_so.shape[0],
        num_slots,
        tuple(sizes),
        rank,
        block_rank,
        block_o,
        min(block_o, 64),
        max(_ROWS, triton.next_power_of_2(y_so.shape[0])),
        step_of(sizes),
        _FEW,
        _CHUNK,
        is_early,
        num_warps=1,  # a lane holds all rows of its columns of B
        launch_pdl=is_early,
    )
