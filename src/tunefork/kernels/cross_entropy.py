"""Output head and cross-entropy in one pass, without the whole batch's logits.

Stock logits and loss cost 12 bytes x tokens x vocabulary. Here a chunk of tokens at a time goes
through the head, and its loss and its gradient are computed while its logits are at hand (the
scheme of Liger Kernel, Hsu et al. 2024, https://arxiv.org/abs/2410.10989): d loss / d logits is
softmax - onehot, so the backward pass only scales what the forward pass has left.

Shape legend as in `reference.py`; C is the tokens of one chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20
"""fp32 logits held at once. Large enough to fill a GPU, small beside a model."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_sd: Tensor, weight_vd: Tensor, targets_s: Tensor) -> Tensor:
        need_hidden, need_weight, _ = ctx.needs_input_grad
        d_hidden_sd = torch.empty_like(hidden_sd) if need_hidden else None
        d_weight_vd: Tensor | None = None
        d_logits_cv = hidden_sd.new_empty(0, weight_vd.shape[0])
        is_one_chunk = hidden_sd.shape[0] <= _chunk_size(weight_vd)
        if need_weight and not is_one_chunk:
            # Chunks are summed in fp32: a bf16 sum over many chunks would lose the small ones.
            d_weight_vd = torch.zeros_like(weight_vd, dtype=torch.float32)
        total = hidden_sd.new_zeros((), dtype=torch.float32)
        for chunk, logits_cv, work_cv in _chunks(hidden_sd, weight_vd):
            h_cd, targets_c = hidden_sd[chunk], targets_s[chunk, None]
            total += _losses(h_cd, weight_vd, targets_c, logits_cv, work_cv).sum()
            # work_cv holds softmax(logits) now; minus the one-hot target it is d loss / d logits.
            work_cv.scatter_add_(1, targets_c, work_cv.new_full(targets_c.shape, -1.0))
            d_logits_cv = logits_cv.copy_(work_cv)
            if d_hidden_sd is not None:
                torch.mm(d_logits_cv, weight_vd, out=d_hidden_sd[chunk])
            if d_weight_vd is not None:
                d_weight_vd += d_logits_cv.t() @ h_cd
        # The weight's gradient is as large as the head. Of one chunk its two factors, which are
        # small, wait for the backward pass instead.
        factors = (d_logits_cv, hidden_sd) if need_weight and is_one_chunk else (None, None)
        ctx.save_for_backward(d_hidden_sd, d_weight_vd, *factors)
        ctx.weight_dtype = weight_vd.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_sd, d_weight_vd, d_logits_sv, hidden_sd = ctx.saved_tensors
        if d_weight_vd is not None:
            d_weight_vd = (d_weight_vd * d_total).to(ctx.weight_dtype)
        elif d_logits_sv is not None:
            d_weight_vd = (d_logits_sv * d_total.to(d_logits_sv.dtype)).t() @ hidden_sd
        if d_hidden_sd is not None:
            d_hidden_sd = d_hidden_sd * d_total.to(d_hidden_sd.dtype)
        return d_hidden_sd, d_weight_vd, None


def linear_cross_entropy_sum(hidden_sd: Tensor, weight_vd: Tensor, targets_s: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(W h)[target]: a scalar, fp32, nats.

    hidden_sd (S, D) and weight_vd (V, D) share a dtype; targets_s (S,) holds ids in [0, V).
    """
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return apply(hidden_sd, weight_vd, targets_s)


@torch.no_grad()
def linear_cross_entropy(hidden_sd: Tensor, weight_vd: Tensor, targets_s: Tensor) -> Tensor:
    """-log softmax(W h)[target] for each token: (S,), fp32, nats, without a gradient."""
    losses = hidden_sd.new_empty(hidden_sd.shape[0], dtype=torch.float32)
    for chunk, logits_cv, work_cv in _chunks(hidden_sd, weight_vd):
        losses[chunk] = _losses(
            hidden_sd[chunk], weight_vd, targets_s[chunk, None], logits_cv, work_cv
        )
    return losses


def _losses(
    h_cd: Tensor, weight_vd: Tensor, targets_c: Tensor, logits_cv: Tensor, work_cv: Tensor
) -> Tensor:
    """Losses (C,) of one chunk; leaves softmax(logits) in `work_cv`, in place throughout."""
    work_cv.copy_(torch.mm(h_cd, weight_vd.t(), out=logits_cv))
    work_cv.sub_(work_cv.amax(-1, keepdim=True))
    target_logits_c = work_cv.gather(1, targets_c)
    z_c = work_cv.exp_().sum(-1, keepdim=True)
    work_cv.div_(z_c)
    return (z_c.log() - target_logits_c)[:, 0]


def _chunks(hidden_sd: Tensor, weight_vd: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the tokens, each with its part of two (C, V) buffers: the weight's dtype, fp32."""
    num_tokens, vocabulary = hidden_sd.shape[0], weight_vd.shape[0]
    size = max(1, min(num_tokens, _chunk_size(weight_vd)))
    logits_cv = weight_vd.new_empty(size, vocabulary)
    work_cv = weight_vd.new_empty(size, vocabulary, dtype=torch.float32)
    for start in range(0, num_tokens, size):
        length = min(size, num_tokens - start)
        yield slice(start, start + length), logits_cv[:length], work_cv[:length]


def _chunk_size(weight_vd: Tensor) -> int:
    return max(1, CHUNK_BYTES // (4 * weight_vd.shape[0]))
