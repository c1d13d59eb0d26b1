"""The LoRA linear over a frozen base with FP8 products, the delta inside the same product.

Weights are e4m3 with one scale an output row (Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433); activations and their gradients are quantised row by row on the
way, so a product is `codes_x @ codes_w^T * scale_x * scale_w`, which a Hopper GPU does at twice
bf16's rate. Weights are made e4m3 for each product from what is kept of them (`fp8_weight.py`), as
they lie for y and transposed for the input's gradient.

The delta rides along. Adding `scale * (x A^T) B^T` to y afterwards reads and writes y once more,
which for 8B-sized layers costs as much as a quarter of the product itself. Instead the operands are
widened, [x | u] [W | scale B]^T with u = x A^T, and the product's inner dimension grows by a few
columns. Three bits of mantissa would be too few for u and B, whose small updates are the training;
each is written as high + low, two e4m3 numbers, and the product as
high*high + low*high + high*low, which keeps about as many bits as bf16 does.

Layers that read the same input (q, k and v; gate and up) are one product: their weights stand one
below the other, their A too, and their B on a block diagonal.

Shape legend: S tokens, D features in, O features out (of all layers), R rank (their sum), P columns
of the widened part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunefork.kernels.compiled import is_on_gpu
from tunefork.kernels.e4m3 import LARGEST, joined, quantize_rows
from tunefork.kernels.e4m3_apart import apart_scale, quantize_apart
from tunefork.kernels.fp8_weight import Rows, balance_of, diagonal, right_columns, rows_of
from tunefork.kernels.layout import Layout
from tunefork.kernels.lora_gradients import lora_gradients


def scaled_mm(a_mk: Tensor, b_nk: Tensor, scale_m1: Tensor, scale_1n: Tensor) -> Tensor:
    """(a * scale_m1) @ (b * scale_n)^T in bf16, for e4m3 operands and fp32 scales.

    K and N must be multiples of 16. On a GPU partial sums are kept in the tensor cores' own
    accumulator (`use_fast_accum`), which has fewer bits than fp32.
    """
    if is_on_gpu(a_mk):
        return torch._scaled_mm(
            a_mk,
            b_nk.t(),
            scale_a=scale_m1,
            scale_b=scale_1n,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return ((a_mk.float() @ b_nk.float().t()) * scale_m1 * scale_1n).to(torch.bfloat16)


def _forward_operand(
    layout: Layout, rows: Rows, apart_om: Tensor, lora_b: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """(O, D + P) codes for y, and the balance."""
    if not layout.width:
        return rows.codes(), None
    beside = apart_om.float()
    if layout.rank:
        b_or = diagonal(lora_b, layout) * layout.scale / rows.scale_1o.t()
        beside = torch.cat([b_or, beside], dim=1)
    balance = balance_of(beside)
    columns = right_columns(beside / balance)
    if layout.filling:
        columns.append(beside.new_zeros(len(beside), layout.filling, dtype=torch.uint8))
    return rows.codes(joined(columns)), balance


def _quantize_input(
    layout: Layout,
    x_sd: Tensor,
    inner_s: Tensor | None,
    squares_s1: Tensor | None,
    probe_md: Tensor,
    balance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(S, D + P) codes and (S, 1) scales. `inner` is what the delta and the directions apart read
    of x; `squares` as `apart_scale` takes it."""
    if not layout.apart or inner_s is None or balance is None:
        return quantize_rows([x_sd], None, inner_s, balance, layout.width)
    scale_s1 = apart_scale(x_sd, inner_s, balance, squares_s1)
    apart, width = layout.apart, layout.width
    return quantize_apart(x_sd, inner_s, apart, probe_md, balance, scale_s1, width), scale_s1


def product(
    x_sd: Tensor,
    layout: Layout,
    weights: Sequence[Tensor],
    a_rd: Tensor | None,
    lora_b: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """y (S, O) of all layers, and u = x A^T (S, R), bf16; where no layer has a delta A and u are
    None."""
    inner_s = x_sd @ inner_weight(weights, a_rd).t() if layout.width else None
    y_so = product_of(x_sd, inner_s, None, layout, weights, lora_b)
    return y_so, None if a_rd is None or inner_s is None else inner_s[:, : layout.rank]


def inner_weight(weights: Sequence[Tensor], a_rd: Tensor | None) -> Tensor:
    """(R + m, D): what reads of x all that is multiplied beside its codes: A, and the directions
    apart."""
    probe_md = weights[-1]
    return probe_md if a_rd is None else torch.cat([a_rd, probe_md])


def product_of(
    x_sd: Tensor,
    inner_s: Tensor | None,
    squares_s1: Tensor | None,
    layout: Layout,
    weights: Sequence[Tensor],
    lora_b: Sequence[Tensor],
) -> Tensor:
    """`product`'s y, with inner = x `inner_weight`^T (S, R + m), None where there is nothing to be
    read; and the sum of each row's squares (S, 1), fp32, where who made x has it."""
    apart_om, probe_md = weights[-2:]
    rows = rows_of(layout, weights, x_sd.shape[1])
    codes_op, balance = _forward_operand(layout, rows, apart_om, lora_b)
    wide, scale_s1 = _quantize_input(layout, x_sd, inner_s, squares_s1, probe_md, balance)
    return scaled_mm(wide, codes_op, scale_s1, rows.scale_1o)


def a_beside(layout: Layout, a_rd: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of A's columns, (D, P), for the input's gradient, and the balance."""
    largest = a_rd.abs().amax().float().clamp(min=1e-30)
    balance = torch.exp2(torch.ceil(torch.log2(largest / LARGEST)))
    columns = right_columns(a_rd.float().t() / balance)
    if filling := layout.back_width - 3 * layout.rank:
        columns.append(a_rd.new_zeros(a_rd.shape[1], filling, dtype=torch.uint8))
    return joined(columns), balance


def turned_product(
    codes_sp: Tensor, scale_s1: Tensor, rows: Rows, beside_dp: Tensor | None
) -> Tensor:
    """dx (S, D), bf16, of gradients times `rows`' scales, as codes (S, O + P) over `scale`."""
    codes_dp = rows.codes_turned(beside_dp)
    return scaled_mm(codes_sp, codes_dp, scale_s1, scale_s1.new_ones(1, codes_dp.shape[0]))


def input_gradient(
    dys: Sequence[Tensor],
    layout: Layout,
    weights: Sequence[Tensor],
    a_rd: Tensor | None,
    du_sr: Tensor | None,
    features_in: int,
) -> Tensor:
    """dx = sum of dy_i W_i + du A, (S, D) bf16; A and du are None where no layer has a delta."""
    beside, balance = (None, None) if a_rd is None else a_beside(layout, a_rd)
    rows = rows_of(layout, weights, features_in)
    # The scales lie along the dimension that is summed over now: dy takes them.
    wide, scale_s1 = quantize_rows(dys, rows.scale_1o, du_sr, balance, layout.back_width)
    return turned_product(wide, scale_s1, rows, beside)


class _Fp8Lora(torch.autograd.Function):
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


def fp8_lora(
    x_d: Tensor,
    layout: Layout,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """y_i = W_i x + scale * B_i A_i x of each layer, for frozen W.

    x_d (..., D) and the results (..., O_i) are bf16. A (R_i, D) and B (O_i, R_i) are those of the
    layers that have a delta, and get gradients in their own dtype. `weights` are those of
    `fp8_weights`.
    """
    apply: Callable[..., tuple[Tensor, ...]] = _Fp8Lora.apply
    a_rd = [torch.cat([a.to(x_d.dtype) for a in lora_a])] if lora_a else []
    b_or = [b.to(x_d.dtype) for b in lora_b]
    parts = apply(layout, len(weights), x_d.reshape(-1, x_d.shape[-1]), *weights, *a_rd, *b_or)
    return tuple(part.view(*x_d.shape[:-1], part.shape[1]) for part in parts)
