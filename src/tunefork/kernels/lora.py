"""The LoRA linear layer with a frozen base, as one autograd function.

Why not let autograd differentiate the definition (`reference.lora_linear`)? Three reasons, in
order of weight. The base's product is accumulated onto the delta, and its input gradient onto the
delta's (`add_product`), so no (tokens, features) intermediate is written twice, and the sum is
rounded once: of a delta that is a 4,096th of a bf16 product 16 % are left the other way round, on a
CPU too (benchmarks/rounded_once.py). A frozen weight is not saved but asked for again (`weight()`),
so an NF4 base is dequantised for one layer at a time, in the forward and once more in the backward
pass. And A and B stay fp32 for the optimiser while every product runs in the base's dtype.

Shape legend as in `reference.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_product(y_mn: Tensor, a_mk: Tensor, b_kn: Tensor) -> Tensor:
    """y + a @ b for an autograd Function that has just made y: in place where it runs as
    written.

    A compiler gets it out of place, and decides itself: of a Function that changes what it made in
    place torch.compile (2.11) loses the gradients, in silence.
    """
    if torch.compiler.is_compiling():
        return torch.addmm(y_mn, a_mk, b_kn)
    return y_mn.addmm_(a_mk, b_kn)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_sd: Tensor,
        weight: Callable[[], Tensor],
        bias_o: Tensor | None,
        lora_a_rd: Tensor,
        lora_b_or: Tensor,
        scale: float,
    ) -> Tensor:
        a_rd, b_or = lora_a_rd.to(x_sd.dtype), lora_b_or.to(x_sd.dtype)
        weight_od = weight()
        xa_sr = x_sd @ a_rd.t()
        if bias_o is None:
            y_so = (xa_sr * scale) @ b_or.t()
        else:
            y_so = torch.addmm(bias_o, xa_sr, b_or.t(), alpha=scale)
        y_so = add_product(y_so, x_sd, weight_od.t())
        ctx.save_for_backward(x_sd, xa_sr, a_rd, b_or)
        ctx.weight, ctx.scale = weight, scale
        ctx.dtypes = (lora_a_rd.dtype, lora_b_or.dtype)
        return y_so

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_so: Tensor) -> tuple[Tensor | None, ...]:
        x_sd, xa_sr, a_rd, b_or = ctx.saved_tensors
        dy_b_sr = (dy_so @ b_or) * ctx.scale
        da_rd = (dy_b_sr.t() @ x_sd).to(ctx.dtypes[0]) if ctx.needs_input_grad[3] else None
        db_or = (
            (dy_so.t() @ xa_sr).to(ctx.dtypes[1]) * ctx.scale if ctx.needs_input_grad[4] else None
        )
        dx_sd = None
        if ctx.needs_input_grad[0]:
            dx_sd = add_product(dy_b_sr @ a_rd, dy_so, ctx.weight())
        return dx_sd, None, None, da_rd, db_or, None


def lora_linear(
    x_d: Tensor,
    weight: Callable[[], Tensor],
    bias_o: Tensor | None,
    lora_a_rd: Tensor,
    lora_b_or: Tensor,
    scale: float,
) -> Tensor:
    """y = W x + bias + scale * B A x, where W is frozen.

    x_d (..., D) has the dtype of W; `weight` returns W (O, D), the same each time; A (R, D) and
    B (O, R) may be fp32 and get gradients in their own dtype. W and the bias get none.
    """
    apply: Callable[..., Tensor] = _LoraLinear.apply
    # Shaped out here, because what a Function returns as a view may not be changed in place, which
    # Falcon does to its queries and keys.
    x_sd = x_d.reshape(-1, x_d.shape[-1])
    y_so = apply(x_sd, weight, bias_o, lora_a_rd, lora_b_or, scale)
    return y_so.view(*x_d.shape[:-1], y_so.shape[1])


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_sd: Tensor, weight: Callable[[], Tensor], bias_o: Tensor | None
    ) -> Tensor:
        ctx.weight = weight
        weight_od = weight()
        return x_sd @ weight_od.t() if bias_o is None else torch.addmm(bias_o, x_sd, weight_od.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_so: Tensor) -> tuple[Tensor | None, ...]:
        return (dy_so @ ctx.weight() if ctx.needs_input_grad[0] else None), None, None


def frozen_linear(x_d: Tensor, weight: Callable[[], Tensor], bias_o: Tensor | None) -> Tensor:
    """y = W x + bias, where W is frozen and asked for again in the backward pass, never saved.

    Shapes and dtypes as for `lora_linear`, which this is without a delta.
    """
    apply: Callable[..., Tensor] = _FrozenLinear.apply
    y_so = apply(x_d.reshape(-1, x_d.shape[-1]), weight, bias_o)
    return y_so.view(*x_d.shape[:-1], y_so.shape[1])
