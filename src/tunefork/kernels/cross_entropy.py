"""Output head and cross-entropy in one pass, without the whole batch's logits.

Stock logits and loss cost 12 bytes x tokens x vocabulary. Here a chunk of tokens at a time goes
through the head, and its loss and its gradient are computed while its logits are at hand (the
scheme of Liger Kernel, Hsu et al. 2024, https://arxiv.org/abs/2410.10989): d loss / d logits is
softmax - onehot, so the backward pass only scales what the forward pass has left. Targets of
`IGNORED` add nothing, to the loss or to a gradient. On a GPU one kernel makes both of a chunk's
logits (`kernels/cross_entropy_triton.py`).

The head stays in bf16 where the layers before it multiply in int8: logits from a head of 8-bit
floats (e4m3) were off by enough to change the loss by a tenth on a fine-tuned SmolLM2, and A's and
B's gradients by half.

Shape legend as in `reference.py`; C is the tokens of one chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunefork.kernels.compiled import is_on_gpu

IGNORED = -100
"""Target of a place that only fills up a batch (PyTorch's own `ignore_index`)."""

CHUNK_BYTES = 64 * 2**20
"""fp32 logits held at once on a CPU: what its caches and memory take well."""

CUDA_CHUNK_BYTES = 2**30
"""Logits held at once on a GPU, in the weight's dtype. With few tokens a chunk the head's weight is
read again and again: an 8B head took 110 ms for 16,384 tokens in chunks of 128 tokens, 79 in chunks
of 1,024 (H200)."""


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
            h_cd = hidden_sd[chunk]
            torch.mm(h_cd, weight_vd.t(), out=logits_cv)
            total += _to_gradient_(logits_cv, work_cv, targets_s[chunk]).sum()
            d_logits_cv = logits_cv
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

    hidden_sd (S, D) and weight_vd (V, D) share a dtype; targets_s (S,) holds ids in [0, V), or
    `IGNORED`.
    """
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return apply(hidden_sd, weight_vd, targets_s)


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_sd: Tensor, weight_vd: Tensor, targets_s: Tensor) -> Tensor:
        d_hidden_sd = torch.empty_like(hidden_sd) if ctx.needs_input_grad[0] else None
        losses_s = hidden_sd.new_empty(hidden_sd.shape[0], dtype=torch.float32)
        for chunk, logits_cv, work_cv in _chunks(hidden_sd, weight_vd):
            torch.mm(hidden_sd[chunk], weight_vd.t(), out=logits_cv)
            losses_s[chunk] = _to_gradient_(logits_cv, work_cv, targets_s[chunk])
            if d_hidden_sd is not None:
                torch.mm(logits_cv, weight_vd, out=d_hidden_sd[chunk])
        ctx.save_for_backward(d_hidden_sd)
        return losses_s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses_s: Tensor) -> tuple[Tensor | None, ...]:
        [d_hidden_sd] = ctx.saved_tensors
        if d_hidden_sd is not None:
            d_hidden_sd = d_hidden_sd * d_losses_s[:, None].to(d_hidden_sd.dtype)
        return d_hidden_sd, None, None


def linear_cross_entropy_each(hidden_sd: Tensor, weight_vd: Tensor, targets_s: Tensor) -> Tensor:
    """-log softmax(W h)[target] for each token: (S,), fp32, nats, with a gradient to h alone.

    A token's loss and gradient hang on no other token. Arguments as for `linear_cross_entropy_sum`.
    """
    apply: Callable[..., Tensor] = _TokenCrossEntropy.apply
    return apply(hidden_sd, weight_vd, targets_s)


@torch.no_grad()
def linear_cross_entropy(hidden_sd: Tensor, weight_vd: Tensor, targets_s: Tensor) -> Tensor:
    """-log softmax(W h)[target] for each token: (S,), fp32, nats, without a gradient."""
    losses = hidden_sd.new_empty(hidden_sd.shape[0], dtype=torch.float32)
    for chunk, logits_cv, work_cv in _chunks(hidden_sd, weight_vd):
        torch.mm(hidden_sd[chunk], weight_vd.t(), out=logits_cv)
        losses[chunk] = _to_gradient_(logits_cv, work_cv, targets_s[chunk])
    return losses


def _to_gradient_(logits_cv: Tensor, work_cv: Tensor | None, targets_c: Tensor) -> Tensor:
    """Losses (C,) of one chunk's logits, which become d loss / d logits in place."""
    if work_cv is None:
        return torch.ops.tunefork.to_gradient_(logits_cv, targets_c)  # type: ignore[no-any-return]
    is_ignored_c1 = (targets_c == IGNORED)[:, None]
    targets_c1 = targets_c.clamp(min=0)[:, None]
    work_cv.copy_(logits_cv)
    work_cv.sub_(work_cv.amax(-1, keepdim=True))
    target_logits_c1 = work_cv.gather(1, targets_c1)
    z_c1 = work_cv.exp_().sum(-1, keepdim=True)
    work_cv.div_(z_c1)
    # Softmax; minus the one-hot target it is d loss / d logits.
    work_cv.scatter_add_(1, targets_c1, work_cv.new_full(targets_c1.shape, -1.0))
    # On a CPU asking costs nothing; a plan's tensors have no values to ask for.
    if not is_ignored_c1.is_meta and bool(is_ignored_c1.any()):
        work_cv.masked_fill_(is_ignored_c1, 0.0)
    logits_cv.copy_(work_cv)
    return (z_c1.log() - target_logits_c1).masked_fill(is_ignored_c1, 0.0)[:, 0]


@torch.library.custom_op("tunefork::to_gradient_", mutates_args=("logits",), device_types="cuda")
def _fused_to_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    from tunefork.kernels.cross_entropy_triton import launch  # needs Triton: it comes with CUDA

    return launch(logits, targets.contiguous(), ignored=IGNORED)


@_fused_to_gradient_.register_fake
def _(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _chunks(hidden_sd: Tensor, weight_vd: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Slices of the tokens, each with its part of a (C, V) buffer in the weight's dtype, and on a
    CPU of one in fp32."""
    num_tokens, vocabulary = hidden_sd.shape[0], weight_vd.shape[0]
    size = max(1, min(num_tokens, _chunk_size(weight_vd)))
    logits_cv = weight_vd.new_empty(size, vocabulary)
    work_cv = None if is_on_gpu(weight_vd) else torch.empty_like(logits_cv, dtype=torch.float32)
    for start in range(0, num_tokens, size):
        end = min(start + size, num_tokens)
        work = None if work_cv is None else work_cv[: end - start]
        yield slice(start, end), logits_cv[: end - start], work


def _chunk_size(weight_vd: Tensor) -> int:
    if is_on_gpu(weight_vd):
        return max(1, CUDA_CHUNK_BYTES // (weight_vd.element_size() * weight_vd.shape[0]))
    return max(1, CHUNK_BYTES // (4 * weight_vd.shape[0]))
