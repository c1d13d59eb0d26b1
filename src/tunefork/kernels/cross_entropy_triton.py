"""The kernel of `kernels/cross_entropy.py`: a row of logits becomes its loss and its gradient.

A program has a row and goes over it twice: once for the largest logit and the sum of exponentials,
which each thread keeps of its own columns until the end (the online softmax: Milakov and
Gimelshein 2018, https://arxiv.org/abs/1805.02867), and once backwards to write, so that what was
read last, and is in the L2 cache still, is read first. torch.compile makes two kernels of it that
take four and two times what reading and writing the logits does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 2048, 8
"""Columns that a program reads at a time, four times one after the other before it adds up."""
_LOWEST = tl.constexpr(-3.4028234663852886e38)
"""fp32's lowest number."""
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _read(logits, at, vocabulary):
    return tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _to_gradient(
    logits, stride, targets, losses, vocabulary, ignored: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    has_target = target != ignored
    hit_at = tl.where(has_target, target, 0)
    is_there = (hit_at >= 0) & (hit_at < vocabulary)
    hit = tl.load(logits + hit_at, mask=is_there, other=float("nan")).to(tl.float32)
    place = tl.arange(0, block)
    # Not -inf, from which -inf is not to be taken: of a number a column that is not there is 0.
    top_v = tl.full([block], _LOWEST, tl.float32)
    sum_v = tl.zeros([block], tl.float32)
    for begin in range(0, vocabulary, 4 * block):
        at = begin + place
        a_v, b_v = _read(logits, at, vocabulary), _read(logits, at + block, vocabulary)
        at += 2 * block
        c_v, d_v = _read(logits, at, vocabulary), _read(logits, at + block, vocabulary)
        higher_v = tl.maximum(tl.maximum(tl.maximum(a_v, b_v), tl.maximum(c_v, d_v)), top_v)
        sum_v = sum_v * _exp(top_v - higher_v) + _exp(a_v - higher_v) + _exp(b_v - higher_v)
        sum_v += _exp(c_v - higher_v) + _exp(d_v - higher_v)
        top_v = higher_v
    top = tl.max(top_v, axis=0)
    log2_sum = tl.log2(tl.sum(sum_v * _exp(top_v - top), axis=0))
    # The two logarithms apart: their sum would round a small loss away where logits are large.
    loss = log2_sum * _LN_2 - (hit - top)
    tl.store(losses + row, tl.where(has_target, loss, 0.0))
    for turn in range(tl.cdiv(vocabulary, block)):
        at = (tl.cdiv(vocabulary, block) - 1 - turn) * block + place
        x_v = _read(logits, at, vocabulary)
        gradient_v = tl.exp2((x_v - top) * _LOG2_E - log2_sum) - (at == target).to(tl.float32)
        gradient_v = tl.where(has_target, gradient_v, 0.0)
        tl.store(logits + at, gradient_v.to(logits.dtype.element_ty), mask=at < vocabulary)


def launch(
    logits_cv: Tensor, targets_c: Tensor, *, ignored: int, block: int = _BLOCK, warps: int = _WARPS
) -> Tensor:
    """Losses (C,), fp32, of `logits` (C, V), each row in one piece, which become d loss / d logits.

    `targets` (C,), contiguous, are in [0, V), or `ignored`, whose loss and gradient are zero; of
    another one the loss is no number, which ends a run before its update.
    """
    tokens, vocabulary = logits_cv.shape
    losses_c = torch.empty(tokens, dtype=torch.float32, device=logits_cv.device)
    if tokens:
        _to_gradient[(tokens,)](
            logits_cv, logits_cv.stride(0), targets_c, losses_c, vocabulary, ignored, block,
            num_warps=warps,
        )  # fmt: skip
    return losses_c
