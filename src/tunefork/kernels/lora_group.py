"""Several LoRA linear layers with one input over a frozen bf16 or NF4 base, as one function.

What `kernels/lora.py` is for one layer, for layers that share their input: one product for their
weights, one for their A. The delta is inside the base's product (`bf16_product.py`), forward and in
the input's gradient. Made to be compiled, so it takes tensors only.

Shape legend as in `layout.py`; S tokens, D features in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunefork.kernels.bf16_product import bf16_product
from tunefork.kernels.int8_weight import dense, diagonal, padded
from tunefork.kernels.layout import Layout
from tunefork.kernels.lora_gradients import lora_gradients

WHOLE_BYTES = 2**28
"""Of a group's dequantised weights: of a larger group each layer's come and go by themselves, for
all of a 70B model's gate and up, beside the parts they are put together from, take 2 GiB."""


def _pieces(layout: Layout, features_in: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """First and last layer (exclusive) of those that are multiplied at one time."""
    count = len(layout.sizes)
    is_large = sum(layout.sizes) * features_in * dtype.itemsize > WHOLE_BYTES
    if layout.storage != "bf16" and is_large:
        return [(at, at + 1) for at in range(count)]
    return [(0, count)]


def base_of(
    layout: Layout,
    weights: Sequence[Tensor],
    features_in: int,
    dtype: torch.dtype,
    piece: tuple[int, int],
) -> Tensor:
    """The weights of a piece's layers, one below the other."""
    if layout.storage == "bf16":
        return weights[0]
    return dense(layout, weights, features_in, dtype, *piece)


def beside(lora_b: Sequence[Tensor], layout: Layout, piece: tuple[int, int]) -> Tensor:
    """scale * B of a piece's layers on a diagonal, (O, R), R of all layers: what u is multiplied
    with."""
    first, last = layout.bounds[piece[0]][0], layout.bounds[piece[1] - 1][1]
    return diagonal(lora_b, layout)[first:last] * layout.scale


class _LoraGroup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layout: Layout, num_weights: int, x_sd: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, lora_b = tensors[:num_weights], tensors[num_weights + 1 :]
        saved: tuple[Tensor, ...] = ()
        if layout.rank:
            a_rd = tensors[num_weights]
            u_sp = x_sd @ padded(a_rd, 0).t()
            saved = (x_sd, u_sp[:, : layout.rank], *tensors[num_weights:])
        ys: tuple[Tensor, ...] = ()
        for piece in _pieces(layout, x_sd.shape[1], x_sd.dtype):
            weight_od = base_of(layout, weights, x_sd.shape[1], x_sd.dtype, piece)
            if layout.rank:
                b_op = padded(beside(lora_b, layout, piece), 1)
                y_so = bf16_product([x_sd], weight_od, u_sp, b_op, is_turned=False)
            else:
                y_so = x_sd @ weight_od.t()
            sizes = list(layout.sizes[slice(*piece)])
            ys += (y_so,) if len(sizes) == 1 else tuple(torch.split(y_so, sizes, dim=1))
        ctx.save_for_backward(*weights, *saved)
        ctx.layout, ctx.num_weights, ctx.features_in = layout, num_weights, x_sd.shape[1]
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        layout, num_weights = ctx.layout, ctx.num_weights
        tensors = ctx.saved_tensors  # asked for once: checkpointing recomputes them on asking
        weights, saved = tensors[:num_weights], tensors[num_weights:]
        gradients: tuple[Tensor, ...] = ()
        if layout.rank:
            x_sd, u_sr, a_rd, *lora_b = saved
            with_delta = [dy for dy, rank in zip(dys, layout.ranks, strict=True) if rank]
            du_sr, db = lora_gradients(with_delta, u_sr, lora_b, layout.scale)
            gradients = (du_sr.t() @ x_sd, *db)
        dx_sd: Tensor | None = None
        if ctx.needs_input_grad[2]:
            for piece in _pieces(layout, ctx.features_in, dys[0].dtype):
                weight_od = base_of(layout, weights, ctx.features_in, dys[0].dtype, piece)
                own = dys[slice(*piece)]
                if dx_sd is None:
                    u, v = (padded(du_sr, 1), padded(a_rd, 0)) if layout.rank else (None, None)
                    dx_sd = bf16_product(own, weight_od, u, v, is_turned=True)
                else:
                    # One layer's, of a large group. cuBLAS rounds it before it adds it, and the sum
                    # again; the delta, which is small, is in the first one's sums.
                    dx_sd = dx_sd.addmm(own[0], weight_od)
        return None, None, dx_sd, *(None for _ in weights), *gradients


def lora_group(
    x_d: Tensor,
    layout: Layout,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """y_i = W_i x + scale * B_i A_i x of each layer, for frozen W.

    x_d (..., D) and the results (..., O_i) have W's dtype. A (R_i, D) and B (O_i, R_i) are those of
    the layers that have a delta, may be fp32, and get gradients in their own dtype. `weights` is
    (W,), all of one below the other, or for storage "nf4" those of `quantized.nf4_tensors`, for
    another those of `int8_weights`.
    """
    apply: Callable[..., tuple[Tensor, ...]] = _LoraGroup.apply
    a_rd = [torch.cat([a.to(x_d.dtype) for a in lora_a])] if lora_a else []
    b_or = [b.to(x_d.dtype) for b in lora_b]
    parts = apply(layout, len(weights), x_d.reshape(-1, x_d.shape[-1]), *weights, *a_rd, *b_or)
    return tuple(part.view(*x_d.shape[:-1], part.shape[1]) for part in parts)
