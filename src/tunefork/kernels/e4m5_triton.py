"""The kernels of `kernels/e4m5.py`: ten bits drawn as e4m3, as they lie and transposed.

Four codes are a word, and so are the pairs of bits of sixteen weights, four of each quarter of a
row: a draw takes ten instructions for four weights, and memory does the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunefork.kernels.adamw_triton import mix

_WORDS = 1024
"""Of a program, of one quarter of its row."""
_TILE = (128, 32)
"""Rows and words of each quarter that a program turns."""
_TURN_WARPS = 8
_BESIDE = 128
"""Columns beside turned codes that are copied at a time: with more the compiler, which gives all of
the kernel the registers that its largest tile takes, spills."""


@triton.jit
def _turns(seed):
    """The turn, in each byte."""
    return (tl.load(seed + 2) & 3) * 0x01010101


@triton.jit
def _carries(low, bits, turns, part: tl.constexpr):
    """1 in each byte whose code goes up."""
    pair = (low >> 2 * part) & 0x03030303
    drawn = (((bits >> 2 * part) & 0x03030303) + turns) & 0x03030303
    return ((pair + drawn) >> 2) & 0x01010101


@triton.jit
def _codes(
    high, low, seed, beside, out, stride, words, width, block: tl.constexpr, block_p: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * block + tl.arange(0, block)
    inside = word < words
    number = (row * words + word).to(tl.uint32)
    bits = mix(number ^ tl.load(seed + 1).to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)
    pairs = tl.load(low + row * words + word, mask=inside, other=0)
    turns = _turns(seed)
    for part in tl.static_range(4):
        place = part * words + word
        codes = tl.load(high + row * 4 * words + place, mask=inside, other=0)
        codes += _carries(pairs, bits, turns, part)
        tl.store(out + row * stride + place, codes, mask=inside)
    if beside is not None and tl.program_id(1) == 0:
        at = tl.arange(0, block_p)
        copied = tl.load(beside + row * width + at, mask=at < width)
        tl.store(out + row * stride + 4 * words + at, copied, mask=at < width)


@triton.jit
def _codes_turned(
    high, low, seed, beside, out, stride, words, features_out, width,
    rows: tl.constexpr, block: tl.constexpr, block_p: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(1) * block
    byte = (4 * start + tl.arange(0, 4 * block)).to(tl.int64)
    inside = byte < 4 * words
    if beside is not None and tl.program_id(0) == tl.num_programs(0) - 1:
        # A program of its own: with a tile besides it would be the last one to end.
        for begin in range(0, width, block_p):
            at = begin + tl.arange(0, block_p)
            mask = inside[:, None] & (at < width)[None, :]
            for part in tl.static_range(4):
                column = part * 4 * words + byte
                copied = tl.load(beside + column[:, None] * width + at[None, :], mask=mask)
                right = out + column[:, None] * stride + features_out
                tl.store(right + at[None, :], copied, mask=mask)
    else:
        row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
        word = start + tl.arange(0, block)
        has_row = row < features_out
        has_word = has_row[:, None] & (word < words)[None, :]
        number = row[:, None] * words + word[None, :]
        key = tl.load(seed).to(tl.uint32, bitcast=True)
        bits = mix(number.to(tl.uint32) ^ key).to(tl.int32, bitcast=True)
        pairs = tl.load(low + number, mask=has_word, other=0)
        turns = _turns(seed)
        kept = inside[:, None] & has_row[None, :]
        for part in tl.static_range(4):
            place = (row * 4 * words)[:, None] + (part * words + word)[None, :]
            codes = tl.load(high + place, mask=has_word, other=0)
            codes += _carries(pairs, bits, turns, part)
            first, second = codes.to(tl.uint8), (codes >> 8).to(tl.uint8)
            third, fourth = (codes >> 16).to(tl.uint8), (codes >> 24).to(tl.uint8)
            odd, even = tl.interleave(second, fourth), tl.interleave(first, third)
            column = part * 4 * words + byte
            to = out + column[:, None] * stride + row[None, :]
            tl.store(to, tl.trans(tl.interleave(even, odd)), mask=kept)


def launch(
    high_od: Tensor, low_oq: Tensor, seed: Tensor, beside_op: Tensor | None, out_op: Tensor
) -> None:
    """Fill `out_op` (O, D + P), e4m3: the codes, and `beside` (O, P), bytes. D and P are multiples
    of 16."""
    rows, words = high_od.shape[0], high_od.shape[1] // 16
    block = min(_WORDS, triton.next_power_of_2(words))
    beside = None if beside_op is None else _as_words(beside_op.contiguous())[0]
    width = 0 if beside is None else beside.shape[1]
    _codes[rows, triton.cdiv(words, block)](
        *_as_words(high_od, low_oq), seed, beside, _as_words(out_op)[0], out_op.stride(0) // 4,
        words, width, block, triton.next_power_of_2(max(1, width)),
        num_warps=max(1, min(4, block // 128)),
    )  # fmt: skip


def launch_turned(
    high_od: Tensor, low_oq: Tensor, seed: Tensor, beside_dp: Tensor | None, out_dp: Tensor
) -> None:
    """Fill `out_dp` (D, O + P), e4m3: the transposed weight, and `beside` (D, P), bytes."""
    rows, words = high_od.shape[0], high_od.shape[1] // 16
    beside = None if beside_dp is None else beside_dp.contiguous()
    width = 0 if beside is None else beside.shape[1]
    across = triton.cdiv(rows, _TILE[0]) + (beside is not None)
    _codes_turned[across, triton.cdiv(words, _TILE[1])](
        *_as_words(high_od, low_oq), seed, beside, out_dp.view(torch.uint8), out_dp.stride(0),
        words, rows, width, *_TILE, min(_BESIDE, triton.next_power_of_2(max(1, width))),
        num_warps=_TURN_WARPS,
    )  # fmt: skip


def _as_words(*tensors: Tensor) -> list[Tensor]:
    return [tensor.view(torch.int32) for tensor in tensors]
