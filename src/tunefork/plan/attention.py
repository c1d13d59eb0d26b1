"""Attention on the meta device: what a GPU's or a CPU's kernel would allocate, and its work.

On the meta device PyTorch's SDPA takes its mathematical definition, which no GPU runs. This stands
in for the kernels that do:

    segments  PyTorch's own operator (`model/packed_attention.py`), whose shapes the meta device
              knows; rows that are one segment each are taken for the same (cuDNN keeps as much)
    no mask   FlashAttention 2 (Dao 2023, https://arxiv.org/abs/2307.08691): saves its output and a
              log-sum-exp a head and query; its backward pass keeps an fp32 sum of the queries'
              gradient, and gradients of keys and values for every query head
    a mask    the memory-efficient kernel: the mask becomes an additive bias in the queries' dtype,
              made anew in each layer and kept for the backward pass, and keys and values are
              repeated for every query head
    CPU       `model.attention`: scores and weights of whole rows

Shape legend: B rows, H query heads, K key-value heads, T queries, U keys, E features of a head.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tunefork.model.attention import LONGEST_ROW
from tunefork.model.attention import attention as cpu_attention
from tunefork.model.packed_attention import flash, refusal
from tunefork.plan.trace import Trace

NAME = "tunefork_plan"
"""Pass as `attn_implementation` after `install`. No mask function is registered under this name, so
transformers builds no mask."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Which kernels to stand in for."""

    device: Literal["cuda", "cpu"]
    is_masked: bool


_ALIGNMENT = 16
"""A bias's rows are padded to a multiple of this."""


class _Flash(torch.autograd.Function):
    """Allocates like the kernel; the numbers are never there."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, trace: Any
    ) -> Tensor:
        batch, heads, length, _ = q.shape
        # The kernels write (B, T, H, E), so that the heads' outputs are one row a token.
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, *(() if bias is None else (bias,)))
        ctx.trace = trace
        trace.count("attention", _flops(q, k, bias), _moved(q, k, v, out))
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *bias = ctx.saved_tensors
        batch, heads, length, features = q.shape
        sums = q.new_empty(batch, heads, -(-length // 128) * 128, features, dtype=torch.float32)
        delta = torch.empty_like(lse)
        dq = torch.empty_like(q)
        dk_of_each = q.new_empty(batch, heads, k.shape[2], features)
        dv_of_each = q.new_empty(batch, heads, k.shape[2], v.shape[-1])
        ctx.trace.count(
            "attention", 2.5 * _flops(q, k, bias[0] if bias else None), 2 * _moved(q, k, v, out)
        )
        del sums, delta
        if heads == k.shape[1]:
            return dq, dk_of_each, dv_of_each, None, None
        return dq, torch.empty_like(k), torch.empty_like(v), None, None


def _flops(q: Tensor, k: Tensor, bias: Tensor | None) -> float:
    """Of the forward pass; without a mask the kernel leaves out what the causal mask hides."""
    batch, heads, length, features = q.shape
    whole = 4.0 * batch * heads * length * k.shape[2] * features
    return whole / 2 if bias is None else whole


def _moved(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def _segments(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """As `packed_attention` on a GPU; raises ValueError for what it refuses."""
    why = refusal(module, q, k, v, dropout=dropout, **kwargs)
    if why is not None:
        raise ValueError(f"{type(module).__name__}: {why} cannot be had without a mask")
    q_nhe, k_nke, v_nke = (states.transpose(1, 2).flatten(0, 1) for states in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out = flash(
        q_nhe, k_nke, v_nke, cu_seq_lens_q, max_length_q, scale=scale, window=sliding_window
    )
    return out.view(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def install(setting: Setting, trace: Trace) -> None:
    """Make `NAME` known to transformers, standing in for the kernels of `setting`."""

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if kwargs.get("cu_seq_lens_q") is not None:
            return _segments(module, q, k, v, **kwargs), None
        batch, heads, length, _ = q.shape
        if setting.device == "cpu" and length <= LONGEST_ROW:
            shape = (batch, 1, length, k.shape[2]) if setting.is_masked else (length, k.shape[2])
            mask = torch.ones(shape, dtype=torch.bool, device=q.device)
            return cpu_attention(module, q, k, v, mask, **kwargs)
        bias = None
        if setting.is_masked:
            if heads > k.shape[1]:
                k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
            aligned = -(-length // _ALIGNMENT) * _ALIGNMENT
            bias = q.new_zeros(batch, 1, length, aligned)[..., :length]
        out: Tensor = _Flash.apply(q, k, v, bias, trace)  # type: ignore[no-untyped-call]
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
