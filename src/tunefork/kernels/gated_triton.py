"""The kernels of `kernels/gated.py`: SwiGLU, and the narrow products that read what it makes.

A program has a rectangle and takes it tile by tile. Forward the rectangle is a block of rows by a
stretch of columns, and the program's share of u stays in registers; backward it is a block of
columns by a stretch of rows, and it is the share of dA that stays. A last kernel sums the shares in
a fixed order, so that the same bits come each time. At 16,384 x 14,336 and rank 16 shares, written
and read, are 1 % of what else is moved.

Both kernels are bound by memory: 6 bytes a value forward, 10 backward. The rows' largest magnitudes
cost an atomic operation a row and column block, and arithmetic that memory leaves room for. They
are compared as the whole numbers that their bits are, which puts a NaN above all others, and is the
same in any order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunefork.kernels.int8_rows_triton import magnitude
from tunefork.kernels.lora_gradients_triton import sum_shares

_SUM_VALUES, _SUM_SHARES = 256, 16
"""Values that a program of the last kernel makes, and shares that it reads at a time at most."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """How the tensors are cut."""

    rows: int
    """Of a tile."""
    columns: int
    """Of a tile."""
    programs: int
    """At least so many, where there are tiles enough."""
    warps: int
    stages: int
    """So many tiles less one are on their way in shared memory while another is worked at; 1: they
    come straight into registers, and other programs of a multiprocessor work meanwhile."""


FORWARD = Blocks(rows=64, columns=128, programs=1024, warps=8, stages=3)
WIDE_FORWARD = Blocks(rows=32, columns=128, programs=1024, warps=4, stages=3)
BACKWARD = Blocks(rows=32, columns=128, programs=784, warps=8, stages=3)
"""For an H200: 0.36 and 0.59 ms at 16,384 x 14,336 and rank 16, 0.39 forward at ranks of 17 to 64;
of a dozen forms that were tried these are the quickest. Without spills two programs of the first
and the last share a Hopper GPU's multiprocessor and have up to 144 and 104 KB on their way there,
and an 8B model's 16,384 tokens are four and three turns of 132 of them."""

_NARROW = 16
"""Largest rank of the forms that are cut for what most adapters have."""
_REFUSES_STAGES = 10
"""Major compute capability that the backward kernel is only compiled for without them."""
_REGISTERS = 128
"""A thread of the backward kernel has so many at most where it compares magnitudes too: with more,
as it would take, a multiprocessor has no room for two programs of the blocks above."""


@triton.jit
def _rounded(x):
    """fp32 -> bf16, as an operation that counts as one with effects.

    Otherwise the compiler (3.6) makes all of h twice, from gate and up in the layout that they are
    loaded in and, moved there both, in the product's: twice the registers and the arithmetic.
    """
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2
    )


@triton.jit
def _silu(gate):
    """sigmoid(gate), and gate times that."""
    share = 1.0 / (1.0 + tl.exp2(gate * -1.4426950408889634))  # a sixth fewer instructions than exp
    return share, gate * share


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    gate, stride_gate, up, stride_up, a, stride_a, h, shares,
    num_rows, features, columns_each,
    rank: tl.constexpr, block_r: tl.constexpr, block_s: tl.constexpr, block_d: tl.constexpr,
    is_whole: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    # Neighbours have the same rows: together they read whole ones.
    first = tl.program_id(0) * columns_each
    last = tl.minimum(first + columns_each, features)
    start = tl.program_id(1).to(tl.int64) * block_s
    row, column, place = tl.arange(0, block_s), tl.arange(0, block_d), tl.arange(0, block_r)
    left = num_rows - tl.program_id(1) * block_s
    mask_s, mask_r = (row < left)[:, None], (place < rank)[None, :]
    gate += start * stride_gate
    up += start * stride_up
    h += start * features
    u_sr = tl.zeros([block_s, block_r], tl.float32)
    for begin in tl.range(first, last, block_d, num_stages=stages):
        at = begin + column
        mask_so, mask_or = mask_s, mask_r
        if not is_whole:
            mask_so = mask_so & (at < last)[None, :]
            mask_or = mask_or & (at < last)[:, None]
        gate_at = gate + row[:, None] * stride_gate + at[None, :]
        gate_so = tl.load(gate_at, mask=mask_so, other=0.0).to(tl.float32)
        up_at = up + row[:, None] * stride_up + at[None, :]
        up_so = tl.load(up_at, mask=mask_so, other=0.0).to(tl.float32)
        a_or = tl.load(a + place[None, :] * stride_a + at[:, None], mask=mask_or, other=0.0)
        _, silu_so = _silu(gate_so)
        h_so = _rounded(silu_so * up_so)
        tl.store(h + row[:, None] * features + at[None, :], h_so, mask=mask_so)
        u_sr = tl.dot(h_so, a_or, u_sr)
    shares += (tl.program_id(0).to(tl.int64) * num_rows + start) * rank
    tl.store(shares + row[:, None] * rank + place[None, :], u_sr, mask=mask_s & mask_r)


@triton.jit(do_not_specialize=["num_rows", "rows_each"])
def _backward(
    gate, stride_gate, up, stride_up, dh, stride_dh, du, stride_du, dgate, dup, shares,
    fold, most, num_rows, rows_each, features,
    rank: tl.constexpr, block_r: tl.constexpr, block_s: tl.constexpr, block_d: tl.constexpr,
    is_whole: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * rows_each
    last = tl.minimum(first + rows_each, num_rows)
    at = tl.program_id(0) * block_d + tl.arange(0, block_d)
    row, place = tl.arange(0, block_s), tl.arange(0, block_r)
    mask_o, mask_r = at < features, place < rank
    start = first.to(tl.int64)
    gate += start * stride_gate
    up += start * stride_up
    dh += start * stride_dh
    du += start * stride_du
    dgate += start * features
    dup += start * features
    da_or = tl.zeros([block_d, block_r], tl.float32)
    for begin in tl.range(first, last, block_s, num_stages=stages):
        mask_s = (begin + row < last)[:, None]
        mask_so = mask_s
        if not is_whole:
            mask_so = mask_so & mask_o[None, :]
        gate_at = gate + row[:, None] * stride_gate + at[None, :]
        gate_so = tl.load(gate_at, mask=mask_so, other=0.0).to(tl.float32)
        up_at = up + row[:, None] * stride_up + at[None, :]
        up_so = tl.load(up_at, mask=mask_so, other=0.0).to(tl.float32)
        dh_at = dh + row[:, None] * stride_dh + at[None, :]
        dh_so = tl.load(dh_at, mask=mask_so, other=0.0).to(tl.float32)
        du_at = du + row[:, None] * stride_du + place[None, :]
        du_sr = tl.load(du_at, mask=mask_s & mask_r[None, :], other=0.0)
        share_so, silu_so = _silu(gate_so)
        h_so = _rounded(silu_so * up_so)
        dgate_so = dh_so * up_so * (share_so + silu_so * (1.0 - share_so))
        dgate_so = dgate_so.to(dgate.dtype.element_ty)
        dup_so = (dh_so * silu_so).to(dup.dtype.element_ty)
        # dup is dh: what is on its way meanwhile, and what others read, are other tiles.
        to = row[:, None] * features + at[None, :]
        tl.store(dgate + to, dgate_so, mask=mask_so)
        tl.store(dup + to, dup_so, mask=mask_so)
        if fold is not None:
            # Read anew for each tile: kept, they would take the registers of a second program.
            fold_gate = tl.load(fold + at, mask=mask_o, other=0.0)[None, :]
            fold_up = tl.load(fold + features + at, mask=mask_o, other=0.0)[None, :]
            gate_so = dgate_so.to(tl.float32) * fold_gate  # of what is rounded, as it is read then
            up_so = dup_so.to(tl.float32) * fold_up
            most_s = tl.max(tl.maximum(magnitude(gate_so), magnitude(up_so)), axis=1)
            tl.atomic_max(most + begin + row, most_s, mask=begin + row < last, sem="relaxed")
        da_or = tl.dot(tl.trans(h_so), du_sr, da_or)
        gate += block_s * stride_gate
        up += block_s * stride_up
        dh += block_s * stride_dh
        du += block_s * stride_du
        dgate += block_s * features
        dup += block_s * features
    shares += tl.program_id(1).to(tl.int64) * features * rank
    shares_at = shares + place[None, :] * features + at[:, None]
    tl.store(shares_at, da_or, mask=mask_o[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["num_shares", "size"])
def _add(shares, out, num_shares, size, block_n: tl.constexpr, block_k: tl.constexpr):
    begin, size = tl.program_id(0).to(tl.int64) * block_n, size.to(tl.int64)
    total = sum_shares(shares, num_shares, size, begin, 1.0, block_n, block_k)
    at = begin + tl.arange(0, block_n)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


def forward(
    gate_sd: Tensor, up_sd: Tensor, a_rd: Tensor, blocks: Blocks | None = None
) -> tuple[Tensor, Tensor]:
    """h (S, D) and u (S, R), as `gated.gated_down` says."""
    blocks = blocks or (FORWARD if a_rd.shape[0] <= _NARROW else WIDE_FORWARD)
    gate_sd, up_sd, a_rd = map(_in_rows, (gate_sd, up_sd, a_rd))
    (tokens, features), rank = gate_sd.shape, a_rd.shape[0]
    down, across = triton.cdiv(tokens, blocks.rows), triton.cdiv(features, blocks.columns)
    each = _each(across, down, blocks) * blocks.columns
    pieces = triton.cdiv(features, each)
    h_sd, u_sr = gate_sd.new_empty(tokens, features), gate_sd.new_empty(tokens, rank)
    shares = gate_sd.new_empty(pieces, tokens, rank, dtype=torch.float32)
    _forward[(pieces, down)](
        gate_sd,
        gate_sd.stride(0),
        up_sd,
        up_sd.stride(0),
        a_rd,
        a_rd.stride(0),
        h_sd,
        shares,
        tokens,
        features,
        each,
        rank,
        max(16, triton.next_power_of_2(rank)),
        blocks.rows,
        blocks.columns,
        features % blocks.columns == 0,
        blocks.stages,
        num_warps=blocks.warps,
    )
    return h_sd, _summed(shares, u_sr)


def backward(
    gate_sd: Tensor,
    up_sd: Tensor,
    dh_sd: Tensor,
    du_sr: Tensor,
    blocks: Blocks = BACKWARD,
    fold_1o: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """dgate (S, D) and dA (R, D), as `gated.gated_gradients` says, and dh becomes dup; with `fold`
    the rows' largest magnitudes (S, 1) too, as `gated.gated_gradients_and_maxima` does.

    Raises ValueError for a dh that is not contiguous.
    """
    if not dh_sd.is_contiguous():
        raise ValueError("dh, which is written over, must be contiguous")
    gate_sd, up_sd, du_sr = map(_in_rows, (gate_sd, up_sd, du_sr))
    (tokens, features), rank = gate_sd.shape, du_sr.shape[1]
    down, across = triton.cdiv(tokens, blocks.rows), triton.cdiv(features, blocks.columns)
    each = _each(down, across, blocks) * blocks.rows
    stretches = triton.cdiv(tokens, each)
    dgate_sd, da_rd = gate_sd.new_empty(gate_sd.shape), gate_sd.new_empty(rank, features)
    shares = gate_sd.new_empty(stretches, rank, features, dtype=torch.float32)
    most_s1 = None if fold_1o is None else shares.new_zeros(tokens, 1)
    _backward[(across, stretches)](
        gate_sd,
        gate_sd.stride(0),
        up_sd,
        up_sd.stride(0),
        dh_sd,
        features,
        du_sr,
        du_sr.stride(0),
        dgate_sd,
        dh_sd,
        shares,
        fold_1o,
        None if most_s1 is None else most_s1.view(torch.int32),
        tokens,
        each,
        features,
        rank,
        max(16, triton.next_power_of_2(rank)),
        blocks.rows,
        blocks.columns,
        features % blocks.columns == 0,
        _stages(rank, blocks, gate_sd.device),
        num_warps=blocks.warps,
        maxnreg=None if fold_1o is None else _REGISTERS,
    )
    da_rd = _summed(shares, da_rd)
    if most_s1 is None:
        return dgate_sd, da_rd
    return dgate_sd, da_rd, most_s1


def _in_rows(tensor: Tensor) -> Tensor:
    """With each row in one piece."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _each(tiles: int, others: int, blocks: Blocks) -> int:
    """Of so many tiles in a row how many are one program's, with `others` such rows."""
    programs = min(tiles, -(-blocks.programs // others))
    return -(-tiles // programs)


def _stages(rank: int, blocks: Blocks, device: torch.device) -> int:
    """Tiles of a larger rank's du would not fit beside those of gate and up; and for a GPU of
    compute capability 10 (B200) the compiler (3.6) refuses to fetch ahead around `_rounded`."""
    is_refused = torch.cuda.get_device_capability(device)[0] == _REFUSES_STAGES
    return blocks.stages if rank <= _NARROW and not is_refused else 1


def _summed(shares: Tensor, out: Tensor) -> Tensor:
    """`out` filled with the sum of the shares."""
    count, size = shares.shape[0], out.numel()
    block_k = min(_SUM_SHARES, triton.next_power_of_2(count))
    _add[(triton.cdiv(size, _SUM_VALUES),)](shares, out, count, size, _SUM_VALUES, block_k)
    return out
