"""The LoRA linear over a frozen base with int8 products, the delta inside the same product.

Activations, their gradients and the weight are rounded to whole numbers of at most 127, one scale a
row, so a product is `codes_x @ codes_w^T * scale_x * scale_w`, which a Hopper GPU does at twice
bf16's rate, and exactly but for that rounding. What such scales cannot stand is outliers (Dettmers
et al. 2022, https://arxiv.org/abs/2208.07339); those of activations lie along few directions, which
are multiplied apart (`directions.py`). The delta's product and theirs are bf16's and go into the
same sums (`int8_product.py`). For the input's gradient the codes are transposed on the way, and the
weight's scales, along which is summed then, are taken into dy before it is rounded.

Layers that read the same input (q, k and v; gate and up) are one product: their weights stand one
below the other, their A too, and their B on a block diagonal.

Shape legend: S tokens, D features in, O features out (of all layers), R rank (their sum), P columns
of what is multiplied in bf16: the delta's and the directions'.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunefork.kernels.int8_product import int8_product
from tunefork.kernels.int8_rows import round_apart, round_rows
from tunefork.kernels.int8_weight import Rows, diagonal, padded, rows_of
from tunefork.kernels.layout import Layout
from tunefork.kernels.lora_gradients import lora_gradients


def product(
    x_sd: Tensor,
    layout: Layout,
    weights: Sequence[Tensor],
    a_rd: Tensor | None,
    lora_b: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """y (S, O) of all layers, and u = x A^T (S, R), bf16; where no layer has a delta A and u are
    None."""
    inner_sp = x_sd @ inner_weight(weights, a_rd).t()
    y_so = product_of(x_sd, inner_sp, layout, weights, lora_b)
    return y_so, None if a_rd is None else inner_sp[:, : layout.rank]


def inner_weight(weights: Sequence[Tensor], a_rd: Tensor | None) -> Tensor:
    """(P, D): what reads of x all that is multiplied beside its codes: A, and the directions
    apart, which come last."""
    probe_md = weights[-1]
    return probe_md if a_rd is None else torch.cat([padded(a_rd, 0), probe_md])


def product_of(
    x_sd: Tensor,
    inner_sp: Tensor,
    layout: Layout,
    weights: Sequence[Tensor],
    lora_b: Sequence[Tensor],
) -> Tensor:
    """`product`'s y, with inner = x `inner_weight`^T."""
    apart_om, probe_md = weights[-2:]
    rows = rows_of(layout, weights, x_sd.shape[1])
    beside_op = apart_om
    if layout.rank:
        b_or = (diagonal(lora_b, layout).float() * layout.scale).to(apart_om.dtype)
        beside_op = torch.cat([padded(b_or, 1), apart_om], dim=1)
    codes_sd, scale_s1 = round_apart(x_sd, inner_sp, probe_md)
    return int8_product(codes_sd, rows.codes(), scale_s1, rows.scale_1o, inner_sp, beside_op)


def turned_product(
    codes_so: Tensor,
    scale_s1: Tensor,
    rows: Rows,
    a_rd: Tensor | None,
    du_sr: Tensor | None,
) -> Tensor:
    """dx (S, D), bf16, of gradients times `rows`' scales as codes over `scale`, and of du A."""
    narrow: tuple[Tensor | None, Tensor | None] = (None, None)
    if a_rd is not None and du_sr is not None:
        narrow = padded(du_sr, 1), padded(a_rd.t(), 1)
    return int8_product(codes_so, rows.codes_turned(), scale_s1, None, *narrow)


def input_gradient(
    dys: Sequence[Tensor],
    layout: Layout,
    weights: Sequence[Tensor],
    a_rd: Tensor | None,
    du_sr: Tensor | None,
    features_in: int,
) -> Tensor:
    """dx = sum of dy_i W_i + du A, (S, D) bf16; A and du are None where no layer has a delta."""
    rows = rows_of(layout, weights, features_in)
    codes_so, scale_s1 = round_rows(dys, rows.scale_1o)
    return turned_product(codes_so, scale_s1, rows, a_rd, du_sr)


class _Int8Lora(torch.autograd.Function):
    # Tensors one by one: torch.compile follows no lists of them into a Function.
    @staticmethod
    def forward(
        ctx: Any, layout: Layout, num_weights: int, x_sd: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, lora_b = tensors[:num_weights], tensors[num_weights + 1 :]
        a_rd = tensors[num_weights] if layout.rank else None
        y_so, u_sr = product(x_sd, layout, weights, a_rd, lora_b)
        saved = () if a_rd is None else (x_sd, u_sr, a_rd, *lora_b)
        ctx.save_for_backward(*weights, *saved)
        ctx.layout, ctx.num_weights, ctx.features_in = layout, num_weights, x_sd.shape[1]
        return torch.split(y_so, list(layout.sizes), dim=1) if len(layout.sizes) > 1 else (y_so,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        layout, num_weights = ctx.layout, ctx.num_weights
        tensors = ctx.saved_tensors  # asked for once: checkpointing recomputes them on asking
        weights, saved = tensors[:num_weights], tensors[num_weights:]
        a_rd, du_sr, gradients = None, None, ()
        if layout.rank:
            x_sd, u_sr, a_rd, *lora_b = saved
            with_delta = [dy for dy, rank in zip(dys, layout.ranks, strict=True) if rank]
            du_sr, db = lora_gradients(with_delta, u_sr, lora_b, layout.scale)
            gradients = (du_sr.t() @ x_sd, *db)
        dx_sd = None
        if ctx.needs_input_grad[2]:
            dx_sd = input_gradient(dys, layout, weights, a_rd, du_sr, ctx.features_in)
        return None, None, dx_sd, *(None for _ in weights), *gradients


def int8_lora(
    x_d: Tensor,
    layout: Layout,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """y_i = W_i x + scale * B_i A_i x of each layer, for frozen W.

    x_d (..., D) and the results (..., O_i) are bf16. A (R_i, D) and B (O_i, R_i) are those of the
    layers that have a delta, and get gradients in their own dtype. `weights` are those of
    `int8_weights`. D and O_i are multiples of `int8_product.STEP`.
    """
    apply: Callable[..., tuple[Tensor, ...]] = _Int8Lora.apply
    a_rd = [torch.cat([a.to(x_d.dtype) for a in lora_a])] if lora_a else []
    b_or = [b.to(x_d.dtype) for b in lora_b]
    parts = apply(layout, len(weights), x_d.reshape(-1, x_d.shape[-1]), *weights, *a_rd, *b_or)
    return tuple(part.view(*x_d.shape[:-1], part.shape[1]) for part in parts)
