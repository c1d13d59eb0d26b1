"""Several LoRA linear layers with one input over a frozen bf16 or NF4 base, as one function.

What `kernels/lora.py` is for one layer, for layers that share their input: one product for their
weights, one for their A. Made to be compiled, so it takes tensors only, and adds products in place
through an operator that says what it changes: torch.compile (2.11) loses gradients where a Function
changes a tensor of its own otherwise.

The deltas are written first, and the base's product is added to them (`kernels/lora_deltas.py`),
forward and backward, but where that product is much larger than x (gate and up: seven times): then,
the product itself is widened, [x | u] [W | scale B]^T, and copying x costs less. A
bf16 W is kept with room for scale B beside it, which `write_delta` fills.

Shape legend as in `layout.py`; S tokens, D features in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunefork.kernels.int8_weight import dense
from tunefork.kernels.layout import Layout
from tunefork.kernels.lora_deltas import lora_deltas
from tunefork.kernels.lora_gradients import lora_gradients


@torch.library.custom_op("tunefork::add_product_", mutates_args=("y_mn",))
def _add_product(y_mn: Tensor, a_mk: Tensor, b_kn: Tensor) -> None:
    """y += a @ b"""
    y_mn.addmm_(a_mk, b_kn)


def product_onto(y_mn: Tensor | None, a_mk: Tensor, b_kn: Tensor) -> Tensor:
    """a @ b, added to y in place if there is one."""
    if y_mn is None:
        return a_mk @ b_kn
    _add_product(y_mn, a_mk, b_kn)
    return y_mn


def is_widened(layout: Layout, features_in: int) -> bool:
    """Whether the product is: where y is more than twice as wide as x."""
    large = sum(layout.sizes) > 2 * features_in
    return large and layout.storage == layout.products == "bf16" and layout.rank > 0


@torch.no_grad()
def with_room(weights: Sequence[Tensor], layout: Layout) -> Tensor:
    """`weights` (O_i, D) one below the other, (O, D + P), with zeros where scale B will stand."""
    features_in = weights[0].shape[1]
    width = layout.bf16_width if is_widened(layout, features_in) else 0
    room = weights[0].new_zeros(sum(layout.sizes), features_in + width)
    for weight, (first, last) in zip(weights, layout.bounds, strict=True):
        room[first:last, :features_in] = weight
    return room


@torch.no_grad()
def write_delta(weight_op: Tensor, lora_b: Sequence[Tensor], layout: Layout) -> None:
    """Put scale * B beside a widened weight, after each change of theirs."""
    column, rest = weight_op.shape[1] - layout.bf16_width, list(lora_b)
    for (first, last), rank in zip(layout.bounds, layout.ranks, strict=True):
        if rank:
            weight_op[first:last, column : column + rank] = rest.pop(0) * layout.scale
        column += rank


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


class _LoraGroup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layout: Layout, num_weights: int, x_sd: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, lora_b = tensors[:num_weights], list(tensors[num_weights + 1 :])
        saved: tuple[Tensor, ...] = ()
        if layout.rank:
            u_sr = x_sd @ tensors[num_weights].t()
            saved = (x_sd, u_sr, *tensors[num_weights:])
        if is_widened(layout, x_sd.shape[1]):
            filling = x_sd.new_zeros(x_sd.shape[0], layout.bf16_width - layout.rank)
            wide_sp = torch.cat([x_sd, u_sr, filling], dim=1)
            # One by one: a GEMM of all is no faster, and each result is contiguous.
            ys = tuple(wide_sp @ weights[0][first:last].t() for first, last in layout.bounds)
        else:
            ys, start = (), 0
            for piece in _pieces(layout, x_sd.shape[1], x_sd.dtype):
                members = slice(*piece)
                ranks, sizes = layout.ranks[members], list(layout.sizes[members])
                y_so = None
                if sum(ranks):
                    own = [
                        lora_b.pop(0) if rank else x_sd.new_empty(size, 0)
                        for rank, size in zip(ranks, sizes, strict=True)
                    ]
                    y_so = lora_deltas(u_sr[:, start : start + sum(ranks)], own, layout.scale)
                start += sum(ranks)
                weight_od = base_of(layout, weights, x_sd.shape[1], x_sd.dtype, piece)
                y_so = product_onto(y_so, x_sd, weight_od.t())
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
        dx_sd = None
        if ctx.needs_input_grad[2]:
            if layout.rank:
                dx_sd = lora_deltas(du_sr, [a_rd.t()], 1.0)
            for first, last in _pieces(layout, ctx.features_in, dys[0].dtype):
                weight_od = base_of(layout, weights, ctx.features_in, dys[0].dtype, (first, last))
                weight_od, row = weight_od[:, : ctx.features_in], 0
                for dy, size in zip(dys[first:last], layout.sizes[first:last], strict=True):
                    dx_sd = product_onto(dx_sd, dy, weight_od[row : row + size])
                    row += size
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
    (W,) of `with_room`, where B must be up to date (`write_delta`), or for storage "nf4" those of
    `quantized.nf4_tensors`, for another those of `int8_weights`.
    """
    apply: Callable[..., tuple[Tensor, ...]] = _LoraGroup.apply
    a_rd = [torch.cat([a.to(x_d.dtype) for a in lora_a])] if lora_a else []
    b_or = [b.to(x_d.dtype) for b in lora_b]
    parts = apply(layout, len(weights), x_d.reshape(-1, x_d.shape[-1]), *weights, *a_rd, *b_or)
    return tuple(part.view(*x_d.shape[:-1], part.shape[1]) for part in parts)
