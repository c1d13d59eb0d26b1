"""An MLP's `down` layer with a LoRA, over a frozen bf16 or NF4 base, from gate and up on.

What `kernels/lora_group.py` is for a layer of its input, for h = silu(gate) * up, which is that
layer's input: between the passes gate, up and u are kept, and h is not (`kernels/gated.py`).

Shape legend as in `gated.py`; O features out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunefork.kernels.bf16_product import bf16_product
from tunefork.kernels.gated import LARGEST_RANK, gated_down, gated_gradients
from tunefork.kernels.int8_weight import padded
from tunefork.kernels.layout import Layout
from tunefork.kernels.lora_gradients import lora_gradients
from tunefork.kernels.lora_group import base_of, beside


def takes(layout: Layout) -> bool:
    """Whether `gated_lora` can do a product: one layer's, in bf16, as it is."""
    is_one = len(layout.sizes) == 1 and 0 < layout.rank <= LARGEST_RANK
    return is_one and layout.products == "bf16"


class _GatedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        gate_sd: Tensor,
        up_sd: Tensor,
        a_rd: Tensor,
        b_or: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        h_sd, u_sp = gated_down(gate_sd, up_sd, padded(a_rd, 0))
        b_op = padded(beside([b_or], layout, (0, 1)), 1)
        y_so = bf16_product([h_sd], _weight(layout, weights, gate_sd), u_sp, b_op, is_turned=False)
        u_sr = u_sp[:, : layout.rank]
        ctx.save_for_backward(gate_sd, up_sd, u_sr, a_rd, b_or, *weights)
        ctx.layout = layout
        return y_so

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_so: Tensor) -> tuple[Tensor | None, ...]:
        gate_sd, up_sd, u_sr, a_rd, b_or, *weights = ctx.saved_tensors
        du_sr, [db_or] = lora_gradients([dy_so], u_sr, [b_or], ctx.layout.scale)
        weight_od = _weight(ctx.layout, weights, gate_sd)
        narrow = padded(du_sr, 1), padded(a_rd, 0)
        dh_sd = bf16_product([dy_so], weight_od, *narrow, is_turned=True)
        dgate_sd, dup_sd, da_rd = gated_gradients(gate_sd, up_sd, dh_sd, du_sr)
        return None, dgate_sd, dup_sd, da_rd, db_or, *(None for _ in weights)


def _weight(layout: Layout, weights: Sequence[Tensor], gate_sd: Tensor) -> Tensor:
    """W (O, D)"""
    return base_of(layout, weights, gate_sd.shape[1], gate_sd.dtype, (0, 1))


def gated_lora(
    gate_d: Tensor,
    up_d: Tensor,
    layout: Layout,
    weights: Sequence[Tensor],
    lora_a_rd: Tensor,
    lora_b_or: Tensor,
) -> Tensor:
    """y = W h + scale * B A h with h = silu(gate) * up, for frozen W.

    gate_d and up_d (..., D) and the result (..., O) have W's dtype, in which h is rounded once. A
    and B may be fp32, and get gradients in their own dtype. `layout`, which `takes` has taken, and
    `weights` are those of `lora_group.lora_group`.
    """
    apply: Callable[..., Tensor] = _GatedLora.apply
    gate_sd, up_sd = gate_d.reshape(-1, gate_d.shape[-1]), up_d.reshape(-1, up_d.shape[-1])
    a_rd, b_or = lora_a_rd.to(gate_d.dtype), lora_b_or.to(gate_d.dtype)
    y_so = apply(layout, gate_sd, up_sd, a_rd, b_or, *weights)
    return y_so.view(*gate_d.shape[:-1], y_so.shape[1])
