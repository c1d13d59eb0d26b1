"""Attention whose result a layer's first run keeps, so that its second run does not make it again.

A layer that runs again in the backward pass makes again what that pass reads. Of attention that is
its result, as large as the layer's input, and the log of each softmax's sum: from these two the
gradient is made (Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 2). Kept beside the input
they spare the forward pass, whose cost grows with the square of a row's length.

The kernels are `packed_attention.py`'s, called as operators: SDPA hides the second result.

Shape legend: B rows, T tokens of a row, N = B * T, H query heads, K key-value heads, E features of
a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunefork.model.attention_reference import gradients, with_sums


@dataclass(frozen=True, slots=True)
class Results:
    """What a layer's attentions made, in their order; the second run takes it out again."""

    has_cudnn: bool
    """Whether rows of one segment each go through cuDNN's kernel (`has_cudnn`)."""
    kept: list[Tensor]


def has_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's attention is the fastest on `device`: on Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def takes_whole_rows(results: Results, query_bhte: Tensor) -> bool:
    """Whether `whole_rows` can do it; its gradient adds up in no fixed order."""
    is_fixed = torch.are_deterministic_algorithms_enabled()
    return results.has_cudnn and not is_fixed and query_bhte.shape[-1] <= 128


def whole_rows(
    results: Results, q_bhte: Tensor, k_bkte: Tensor, v_bkte: Tensor, *, scale: float
) -> Tensor:
    """Causal attention in each row, (B, T, H, E), by cuDNN."""
    if torch.is_grad_enabled():
        apply: Callable[..., Tensor] = _WholeRows.apply
        return apply(q_bhte, k_bkte, v_bkte, *_taken(results, 2), scale)
    out_bhte, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_bhte, k_bkte, v_bkte, None, True, 0.0, True, False, scale=scale
    )
    out_bthe: Tensor = out_bhte.transpose(1, 2)
    results.kept.extend((out_bthe, sums))
    return out_bthe


def segments(
    results: Results,
    q_nhe: Tensor,
    k_nke: Tensor,
    v_nke: Tensor,
    starts: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention within segments, (N, H, E), by flash; on a CPU by definition.

    The arguments are those of `attention_reference.reference`.
    """
    if torch.is_grad_enabled():
        apply: Callable[..., Tensor] = _Segments.apply
        kept = _taken(results, 4 if q_nhe.is_cuda else 2)
        return apply(q_nhe, k_nke, v_nke, starts, longest, scale, window, *kept)
    if q_nhe.is_cuda:
        made = flash_with_sums(q_nhe, k_nke, v_nke, starts, longest, scale=scale, window=window)
    else:
        made = with_sums(q_nhe, k_nke, v_nke, starts, scale=scale, window=window)
    results.kept.extend(made)
    return made[0]


def flash_with_sums(
    q_nhe: Tensor,
    k_nke: Tensor,
    v_nke: Tensor,
    starts: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, ...]:
    """Attention by PyTorch's flash, (N, H, E), the logs of the softmaxes' sums, and two tensors
    that its backward pass asks for. CUDA, bf16 or fp16.

    `torch.nn.attention.varlen` wraps the same operator, but its arguments change from one version
    of PyTorch to the next; the operator's do not.
    """
    made: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
        q_nhe,
        k_nke,
        v_nke,
        starts,
        starts,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=scale,
        **_sides(window),
    )
    return made[:4]


def _taken(results: Results, count: int) -> list[Tensor]:
    return [results.kept.pop(0) for _ in range(count)]


def _sides(window: int | None) -> dict[str, int]:
    """A window as flash counts it: tokens to the left and to the right of one's own."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


class _WholeRows(torch.autograd.Function):
    """The kept result, as if it had been made of q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, out_bthe: Tensor, sums: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, out_bthe, sums)
        ctx.scale = scale
        return out_bthe.view_as(out_bthe)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_bthe: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out_bthe, sums = ctx.saved_tensors
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout: unread
        made = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout_bthe.transpose(1, 2),
            q,
            k,
            v,
            out_bthe.transpose(1, 2),
            sums,
            seed,
            seed,
            None,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            True,
            scale=ctx.scale,
        )
        return *made, None, None, None


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: Tensor,
        longest: int,
        scale: float,
        window: int | None,
        *kept: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, starts, *kept)
        ctx.longest, ctx.scale, ctx.window = longest, scale, window
        return kept[0].view_as(kept[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_nhe: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts, out, sums, *random = ctx.saved_tensors
        if q.is_cuda:
            made = torch.ops.aten._flash_attention_backward(
                dout_nhe,
                q,
                k,
                v,
                out,
                sums,
                starts,
                starts,
                ctx.longest,
                ctx.longest,
                0.0,
                True,
                *random,
                scale=ctx.scale,
                **_sides(ctx.window),
            )
        else:
            made = gradients(
                dout_nhe, q, k, v, out, sums, starts, scale=ctx.scale, window=ctx.window
            )
        return *made, *[None] * (4 + 2 + len(random))
