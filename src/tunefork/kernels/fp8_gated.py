"""An MLP over two frozen bases with FP8 products and a LoRA on each of its layers, as one function.

What `kernels/fp8.py` is for layers with one input, for y = W h with h = silu(gate) * up, where gate
and up are such layers. Between the passes x, gate and up are kept, and h is not: in the backward
pass A's gradient of the last layer is made where the gradients of gate and up are
(`kernels/gated.py`), of an h that is made again in registers. The lengths of these gradients' rows
come from the same kernel, so that one reading of them makes the codes of the product for x's
gradient, and what A and B need (`kernels/fp8_gradients.py`).

Forward the kernel that makes h makes what is read of it for the delta and the directions apart, and
its rows' lengths (`e4m3_apart.apart_scale`); where that is too wide for it (over NF4, and over ten
bits from rank 17 on) h is plain PyTorch, for the compiler to make it and the lengths in one kernel.

Shape legend: S tokens, D features of x, E of gate, up and h, R rank of gate and up together, Q of
the last layer, which has O features out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunefork.kernels.compiled import compiled_on_cuda
from tunefork.kernels.fp8 import (
    a_beside,
    inner_weight,
    input_gradient,
    product,
    product_of,
    turned_product,
)
from tunefork.kernels.fp8_gradients import gradient_codes, gradient_scale
from tunefork.kernels.fp8_weight import rows_of
from tunefork.kernels.gated import (
    LARGEST_RANK,
    gated_down_and_squares,
    gated_gradients,
    gated_gradients_and_squares,
    has_kernels,
    swiglu,
)
from tunefork.kernels.layout import Layout
from tunefork.kernels.lora_gradients import lora_gradients

_STORAGES = ("e4m5", "nf4")
"""Of bases that are trained over in FP8."""


def takes(pair: Layout, last: Layout) -> bool:
    """Whether `fp8_gated` can do an MLP of these layouts: gate's and up's, the last layer's."""
    layouts = (pair, last)
    is_fp8 = all(x.products == "fp8" and x.storage in _STORAGES for x in layouts)
    are_sizes = len(pair.sizes) == 2 and pair.sizes[0] == pair.sizes[1] and len(last.sizes) == 1
    return is_fp8 and are_sizes and all(pair.ranks) and 0 < last.rank <= LARGEST_RANK


@compiled_on_cuda()
def _h(gate_se: Tensor, up_se: Tensor) -> Tensor:
    return swiglu(gate_se, up_se)


def _h_and_inner(both_se: Tensor, reads_ke: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """h, h reads^T, and the sums of the squares of h's rows where a kernel makes them too."""
    gate_se, up_se = _gate_and_up(both_se)
    if has_kernels(gate_se, len(reads_ke)):
        return gated_down_and_squares(gate_se, up_se, reads_ke)
    h_se = _h(gate_se, up_se)
    return h_se, h_se @ reads_ke.t(), None


class _Fp8Gated(torch.autograd.Function):
    # Tensors one by one: torch.compile follows no lists of them into a Function.
    @staticmethod
    def forward(
        ctx: Any, pair: Layout, last: Layout, num_weights: int, x_sd: Tensor, *tensors: Tensor
    ) -> Tensor:
        pair_weights, (a_rd, gate_b, up_b, a_qe, b_oq), last_weights = _parts_of(
            tensors, num_weights
        )
        both_se, u_sr = product(x_sd, pair, pair_weights, a_rd, [gate_b, up_b])
        h_se, inner_s, squares_s1 = _h_and_inner(both_se, inner_weight(last_weights, a_qe))
        y_so = product_of(h_se, inner_s, squares_s1, last, last_weights, [b_oq])
        u_sq = inner_s[:, : last.rank]
        ctx.save_for_backward(x_sd, u_sr, both_se, u_sq, *tensors)
        ctx.pair, ctx.last, ctx.num_weights = pair, last, num_weights
        return y_so

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_so: Tensor) -> tuple[Tensor | None, ...]:
        pair, last = ctx.pair, ctx.last
        x_sd, u_sr, both_se, u_sq, *tensors = ctx.saved_tensors
        pair_weights, trained, last_weights = _parts_of(tensors, ctx.num_weights)
        a_rd, gate_b, up_b, a_qe, b_oq = trained
        gate_se, up_se = _gate_and_up(both_se)
        du_sq, [db_oq] = lora_gradients([dy_so], u_sq, [b_oq], last.scale)
        dh_se = input_gradient([dy_so], last, last_weights, a_qe, du_sq, gate_se.shape[1])
        gated, lora_b, dx_sd = (gate_se, up_se, dh_se, du_sq), [gate_b, up_b], None
        if ctx.needs_input_grad[3]:
            rows = rows_of(pair, pair_weights, x_sd.shape[1])
            beside, balance = a_beside(pair, a_rd)
            *dys, da_qe, squares_s1 = gated_gradients_and_squares(*gated, rows.scale_1o)
            fold = (lora_b, pair.scale, rows.scale_1o)
            scale_s1 = gradient_scale(squares_s1.sqrt(), *fold, balance)
            codes, du_sr, db = gradient_codes(dys, u_sr, *fold, scale_s1, balance, pair.back_width)
            dx_sd = turned_product(codes, scale_s1, rows, beside)
        else:
            *dys, da_qe = gated_gradients(*gated)
            du_sr, db = lora_gradients(dys, u_sr, lora_b, pair.scale)
        gradients = (du_sr.t() @ x_sd, *db, da_qe, db_oq)
        of_pair, of_last = [None] * len(pair_weights), [None] * len(last_weights)
        return None, None, None, dx_sd, *of_pair, *gradients, *of_last


def _parts_of(
    tensors: Sequence[Tensor], num_weights: int
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Weights of gate and up, what is trained, the last layer's weights."""
    trained = slice(num_weights, num_weights + 5)
    return tensors[:num_weights], tensors[trained], tensors[trained.stop :]


def _gate_and_up(both_se: Tensor) -> tuple[Tensor, Tensor]:
    gate_se, up_se = both_se.chunk(2, dim=1)
    return gate_se, up_se


def fp8_gated(
    x_d: Tensor,
    pair: Layout,
    pair_weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    last: Layout,
    last_weights: Sequence[Tensor],
    last_a_qe: Tensor,
    last_b_oq: Tensor,
) -> Tensor:
    """y = W h + scale * B A h with h = silu(gate) * up, for frozen W; gate and up the same of x.

    x_d (..., D) and the result (..., O) are bf16; h is rounded to bf16 once. `pair` and its weights
    are gate's and up's, as `fp8.fp8_lora` has them, with A (R_i, D) and B (E, R_i) of both; `takes`
    has taken the two layouts. A and B get gradients in their own dtype.
    """
    apply: Callable[..., Tensor] = _Fp8Gated.apply
    a_rd = torch.cat([a.to(x_d.dtype) for a in lora_a])
    rest = [tensor.to(x_d.dtype) for tensor in (*lora_b, last_a_qe, last_b_oq)]
    x_sd, tensors = x_d.reshape(-1, x_d.shape[-1]), (*pair_weights, a_rd, *rest, *last_weights)
    y_so = apply(pair, last, len(pair_weights), x_sd, *tensors)
    return y_so.view(*x_d.shape[:-1], y_so.shape[1])
