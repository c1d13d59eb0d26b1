"""An MLP over frozen bases with int8 products and a LoRA on each of its layers, as one function.

What `kernels/int8.py` is for layers with one input, for y = W h with h = silu(gate) * up, where
gate and up are such layers. Between the passes x, gate and up are kept, and h is not: in the
backward pass A's gradient of the last layer is made where the gradients of gate and up are
(`kernels/gated.py`), of an h that is made again in registers. The largest magnitudes of these
gradients' rows come from the same kernel, so that one reading of them makes the codes of the
product for x's gradient, and what A and B need (`kernels/int8_gradients.py`).

Forward the kernel that makes h makes what is read of it for the delta and the directions apart;
where that is too wide for it (from rank 17 on) h is plain PyTorch, for the compiler.

Shape legend: S tokens, D features of x, E of gate, up and h, R rank of gate and up together, Q of
the last layer, which has O features out, P columns of what is read of h.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunefork.kernels.compiled import compiled_on_cuda
from tunefork.kernels.gated import (
    LARGEST_RANK,
    gated_down,
    gated_gradients,
    gated_gradients_and_maxima,
    has_kernels,
    swiglu,
)
from tunefork.kernels.int8 import (
    inner_weight,
    input_gradient,
    product,
    product_of,
    turned_product,
)
from tunefork.kernels.int8_gradients import gradient_codes
from tunefork.kernels.int8_weight import rows_of
from tunefork.kernels.layout import Layout
from tunefork.kernels.lora_gradients import lora_gradients


def takes(pair: Layout, last: Layout) -> bool:
    """Whether `int8_gated` can do an MLP of these layouts: gate's and up's, the last layer's."""
    is_int8 = pair.products == last.products == "int8"
    are_sizes = len(pair.sizes) == 2 and pair.sizes[0] == pair.sizes[1] and len(last.sizes) == 1
    return is_int8 and are_sizes and all(pair.ranks) and 0 < last.rank <= LARGEST_RANK


@compiled_on_cuda()
def _h(gate_se: Tensor, up_se: Tensor) -> Tensor:
    return swiglu(gate_se, up_se)


def _h_and_inner(both_se: Tensor, reads_pe: Tensor) -> tuple[Tensor, Tensor]:
    """h, and h reads^T."""
    gate_se, up_se = _gate_and_up(both_se)
    if has_kernels(gate_se, len(reads_pe)):
        return gated_down(gate_se, up_se, reads_pe)
    h_se = _h(gate_se, up_se)
    return h_se, h_se @ reads_pe.t()


class _Int8Gated(torch.autograd.Function):
    # Tensors one by one: torch.compile follows no lists of them into a Function.
    @staticmethod
    def forward(
        ctx: Any, pair: Layout, last: Layout, num_weights: int, x_sd: Tensor, *tensors: Tensor
    ) -> Tensor:
        pair_weights, (a_rd, gate_b, up_b, a_qe, b_oq), last_weights = _parts_of(
            tensors, num_weights
        )
        both_se, u_sr = product(x_sd, pair, pair_weights, a_rd, [gate_b, up_b])
        h_se, inner_sp = _h_and_inner(both_se, inner_weight(last_weights, a_qe))
        y_so = product_of(h_se, inner_sp, last, last_weights, [b_oq])
        u_sq = inner_sp[:, : last.rank]
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
            fold_1e = rows.scale_1o
            *dys, da_qe, most_s1 = gated_gradients_and_maxima(*gated, fold_1e)
            codes, scale_s1, du_sr, db = gradient_codes(
                dys, u_sr, lora_b, pair.scale, fold_1e, most_s1
            )
            dx_sd = turned_product(codes, scale_s1, rows, a_rd, du_sr)
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


def int8_gated(
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
    are gate's and up's, as `int8.int8_lora` has them, with A (R_i, D) and B (E, R_i) of both;
    `takes` has taken the two layouts. A and B get gradients in their own dtype.
    """
    apply: Callable[..., Tensor] = _Int8Gated.apply
    a_rd = torch.cat([a.to(x_d.dtype) for a in lora_a])
    rest = [tensor.to(x_d.dtype) for tensor in (*lora_b, last_a_qe, last_b_oq)]
    x_sd, tensors = x_d.reshape(-1, x_d.shape[-1]), (*pair_weights, a_rd, *rest, *last_weights)
    y_so = apply(pair, last, len(pair_weights), x_sd, *tensors)
    return y_so.view(*x_d.shape[:-1], y_so.shape[1])
