"""The LoRA linear over a frozen base with FP8 products, the delta inside the same product.

Weights are e4m3 with one scale an output row (Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433); activations and their gradients are quantised row by row on the
way, so a product is `codes_x @ codes_w^T * scale_x * scale_w`, which a Hopper GPU does at twice
bf16's rate. The input's gradient needs the weight transposed, which is kept as a second copy or
made on the way; an NF4 base is turned into e4m3 each time.

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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunefork.kernels.compiled import compiled_on_cuda, is_on_gpu
from tunefork.kernels.e4m3 import (
    E4M3,
    LARGEST,
    LOW,
    as_codes,
    joined,
    quantize_rows,
    row_scale,
    split,
    weight_scales,
)
from tunefork.kernels.fp8_correction import correction
from tunefork.kernels.layout import Layout
from tunefork.kernels.nf4_e4m3 import Nf4Rows, nf4_scales
from tunefork.kernels.quantized import dequantize_nf4_tensors


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


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A frozen (O, D) weight in e4m3, widened by P columns for a delta."""

    codes_op: Tensor
    """(O, D + P): the weight, then what `write_delta` puts there for the forward product."""
    scale_1o: Tensor
    balance: Tensor
    """() fp32, a power of two, at least 1: taken from B and given to u where B would overflow."""
    probe_cd: Tensor
    """(C, D) bf16: what reads x for the spare columns (`fp8_correction.py`); zeros until then."""
    codes_dp: Tensor | None
    """(D, O + P): the same weight transposed and quantised along its columns, for the input's
    gradient. None where it is made from the first copy each time."""
    scale_1d: Tensor | None
    balance_d: Tensor | None
    """The same for A and du."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All that there are, in order."""
        forward = (self.codes_op, self.scale_1o, self.balance, self.probe_cd)
        kept = (*forward, self.codes_dp, self.scale_1d, self.balance_d)
        return tuple(tensor for tensor in kept if tensor is not None)


@torch.no_grad()
def quantize_weight(weights: Sequence[Tensor], layout: Layout) -> Fp8Weight:
    """`weights` (O_i, D), one a layer, in e4m3, with room for their deltas, zero until written."""

    def widened(parts: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
        first = parts[0]
        rows, columns = sum(part.shape[0] for part in parts), first.shape[1]
        room = torch.zeros(rows, columns + width, dtype=torch.uint8, device=first.device)
        scale_o1, start = weight_scales([row_scale(part) for part in parts]), 0
        for part in parts:  # one at a time: the fp32 form of a layer is four times its codes
            end = start + len(part)
            codes = as_codes(part, scale_o1[start:end])
            room[start:end, :columns] = codes.view(torch.uint8)
            start = end
        return room.view(E4M3), scale_o1.t().contiguous()

    codes_op, scale_1o = widened(weights, layout.width)
    balance = torch.ones((), device=codes_op.device)
    probe_cd = torch.zeros(
        layout.spare, weights[0].shape[1], dtype=torch.bfloat16, device=codes_op.device
    )
    forward = (codes_op, scale_1o, balance, probe_cd)
    if layout.storage == "fp8":
        return Fp8Weight(*forward, None, None, None)
    turned = [torch.cat([w.t() for w in weights], dim=1)]
    codes_dp, scale_1d = widened(turned, layout.back_width)
    return Fp8Weight(*forward, codes_dp, scale_1d, balance.clone())


@torch.no_grad()
def correct(weight: Fp8Weight, x_sd: Tensor, weights: Sequence[Tensor], layout: Layout) -> None:
    """Fill the spare columns for inputs like `x_sd`; `weights` are what was quantised."""
    size = x_sd.shape[1]
    found = correction(x_sd, weights, weight.codes_op[:, :size], weight.scale_1o.t(), layout.spare)
    bytes_op = weight.codes_op.view(torch.uint8)
    bytes_op[:, size + 3 * layout.rank :] = found.columns_oc.view(torch.uint8)
    weight.probe_cd.copy_(found.probe_cd)


def nf4_weights(tensors: Sequence[Tensor], layout: Layout, features_in: int) -> tuple[Tensor, ...]:
    """What is kept of an NF4 base: the `nf4_tensors` of each layer, their `nf4_scales`, and of a
    `Correction` that corrects nothing the directions apart, the columns' bytes, and the probe."""
    rows, device = sum(layout.sizes), tensors[0].device
    return (
        *tensors,
        nf4_scales(tensors, layout.sizes, features_in),
        torch.zeros(rows, layout.apart, dtype=torch.bfloat16, device=device),
        torch.zeros(rows, layout.spare, dtype=torch.uint8, device=device),
        torch.zeros(layout.apart + layout.spare, features_in, dtype=torch.bfloat16, device=device),
    )


@torch.no_grad()
def correct_nf4(x_sd: Tensor, weights: Sequence[Tensor], layout: Layout) -> None:
    """`correct` for an NF4 base, whose e4m3 form is made anew each time: `weights` are those of
    `nf4_weights`, and the last of them are filled."""
    size = x_sd.shape[1]
    weight_od = dequantize_nf4_tensors(weights, layout.sizes, size, torch.bfloat16)
    rows = _nf4_rows(layout, weights, size)
    scale_o1 = rows.scale_1o.t()
    found = correction(x_sd, [weight_od], rows.codes(), scale_o1, layout.spare, layout.apart)
    apart_om, columns_oc, probe_cd = weights[-3:]
    apart_om.copy_(found.apart_om)
    columns_oc.copy_(found.columns_oc.view(torch.uint8))
    probe_cd.copy_(found.probe_cd)


@torch.no_grad()
def write_delta(
    weight: Fp8Weight, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], layout: Layout
) -> None:
    """Put scale * B beside the weight and A beside its transpose, after each change of theirs.

    `lora_a` (R_i, D) and `lora_b` (O_i, R_i) are those of the layers that have a delta, in order.
    """
    found = _b_columns(tuple(lora_b), weight.scale_1o, layout)
    _put(found, weight.codes_op, weight.balance, layout.width)
    if weight.codes_dp is not None and weight.scale_1d is not None:
        found = _a_columns(tuple(lora_a), weight.scale_1d)
        _put(found, weight.codes_dp, weight.balance_d, layout.back_width)


def _put(found: tuple[Tensor, Tensor], codes: Tensor, balance: Any, width: int) -> None:
    columns, new_balance = found
    balance.copy_(new_balance)
    start = codes.shape[1] - width
    codes.view(torch.uint8)[:, start : start + columns.shape[1]] = columns


@compiled_on_cuda(dynamic=False)
def _b_columns(
    lora_b: tuple[Tensor, ...], scale_1o: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """The bytes of B's columns (O, 3R), and the balance."""
    b_or = _diagonal(lora_b, layout) * layout.scale / scale_1o.t()
    balance = _balance(b_or)
    return joined(_right(b_or / balance)), balance


@compiled_on_cuda(dynamic=False)
def _a_columns(lora_a: tuple[Tensor, ...], scale_1d: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of A's columns (D, 3R), and the balance."""
    a_dr = torch.cat(lora_a).float().t() / scale_1d.t()
    balance = _balance(a_dr)
    return joined(_right(a_dr / balance)), balance


def _balance(delta: Tensor) -> Tensor:
    excess = (delta.abs().amax() / LARGEST).clamp(min=1.0)
    return torch.exp2(torch.ceil(torch.log2(excess)))


def _diagonal(lora_b: Sequence[Tensor], layout: Layout) -> Tensor:
    """B of each layer on the diagonal of an (O, R) matrix, fp32."""
    rest, rows, start = list(lora_b), [], 0
    for size, rank in zip(layout.sizes, layout.ranks, strict=True):
        after = layout.rank - start - rank
        if rank:
            b = rest.pop(0).float()
            rows.append(torch.cat([b.new_zeros(size, start), b, b.new_zeros(size, after)], dim=1))
        else:
            rows.append(lora_b[0].new_zeros(size, layout.rank, dtype=torch.float32))
        start += rank
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _right(wide: Tensor) -> list[Tensor]:
    """The right operand's columns of the delta: high | high / 16 | low."""
    high, low = split(wide)
    return [high, high.float().div(LOW).to(E4M3), low]


def _forward_operand(
    layout: Layout, weights: Sequence[Tensor], lora_b: Sequence[Tensor], features_in: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(O, D + P) codes, their (1, O) scale and the balance, for y."""
    if layout.storage != "nf4":
        codes_op, scale_1o, balance = weights[:3]
        return codes_op, scale_1o, balance
    rows = _nf4_rows(layout, weights, features_in)
    apart_om, rest_oc, _ = weights[-3:]
    beside = apart_om.float()
    if layout.rank:
        b_or = _diagonal(lora_b, layout) * layout.scale / rows.scale_1o.t()
        beside = torch.cat([b_or, beside], dim=1)
    balance = _balance(beside)
    codes_op = rows.codes(joined([*_right(beside / balance), rest_oc]))
    return codes_op, rows.scale_1o, balance


def _nf4_rows(layout: Layout, weights: Sequence[Tensor], features_in: int) -> Nf4Rows:
    count = 5 * len(layout.sizes)
    return Nf4Rows(weights[:count], weights[count], layout.sizes, features_in)


def _backward_operand(
    layout: Layout, weights: Sequence[Tensor], a_rd: Tensor | None, features_in: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(D, O + P) codes, their (1, D) scale, what dy is multiplied by, and the balance, for dx."""
    if layout.storage == "fp8_twice":
        return weights[4], weights[5], None, weights[6]
    columns, balance = [], None
    if a_rd is not None:
        largest = a_rd.abs().amax().float().clamp(min=1e-30)
        balance = torch.exp2(torch.ceil(torch.log2(largest / LARGEST)))
        columns = _right(a_rd.float().t() / balance)
        if filling := layout.back_width - 3 * layout.rank:
            columns.append(a_rd.new_zeros(features_in, filling, dtype=torch.uint8))
    # The scales lie along the dimension that is summed over now: dy takes them.
    if layout.storage == "nf4":
        rows = _nf4_rows(layout, weights, features_in)
        codes_dp = rows.codes_turned(joined(columns) if columns else None)
        scale_1o = rows.scale_1o
    else:
        codes_op, scale_1o = weights[:2]
        codes_od = codes_op[:, : codes_op.shape[1] - layout.width]
        codes_dp = joined([codes_od.view(torch.uint8).t().contiguous(), *columns]).view(E4M3)
    return codes_dp, scale_1o.new_ones(1, features_in), scale_1o, balance


class _Fp8Lora(torch.autograd.Function):
    # Tensors one by one: torch.compile follows no lists of them into a Function.
    @staticmethod
    def forward(
        ctx: Any, layout: Layout, num_weights: int, x_sd: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, lora_b = tensors[:num_weights], tensors[num_weights + 1 :]
        a_rd = tensors[num_weights] if layout.rank else None
        probe_cd = weights[-1] if layout.storage == "nf4" else weights[3]
        readers = probe_cd if a_rd is None else torch.cat([a_rd, probe_cd])
        read_s, inner = x_sd @ readers.t(), layout.rank + layout.apart
        u_sr, whole_sd = read_s[:, : layout.rank], x_sd
        if layout.apart:
            along_sm = read_s[:, layout.rank : inner]
            whole_sd = torch.addmm(x_sd, along_sm, probe_cd[: layout.apart], alpha=-1)
        codes_op, scale_1o, balance = _forward_operand(layout, weights, lora_b, x_sd.shape[1])
        wide, scale_s1 = quantize_rows(
            [whole_sd],
            None,
            read_s[:, :inner] if inner else None,
            balance,
            layout.width,
            read_s[:, inner:],
        )
        y_so = scaled_mm(wide, codes_op, scale_s1, scale_1o)
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
            ranks = [rank for rank in layout.ranks if rank]
            du = [dy @ b * layout.scale for dy, b in zip(with_delta, lora_b, strict=True)]
            du_sr = torch.cat(du, dim=1) if len(du) > 1 else du[0]
            us = torch.split(u_sr, ranks, dim=1)
            db = [(dy.t() @ u) * layout.scale for dy, u in zip(with_delta, us, strict=True)]
            gradients = (du_sr.t() @ x_sd, *db)
        dx_sd = None
        if ctx.needs_input_grad[2]:
            codes_dp, scale_1d, fold_1o, balance = _backward_operand(
                layout, weights, a_rd, ctx.features_in
            )
            wide, scale_s1 = quantize_rows(dys, fold_1o, du_sr, balance, layout.back_width)
            dx_sd = scaled_mm(wide, codes_dp, scale_s1, scale_1d)
        return None, None, dx_sd, *(None for _ in weights), *gradients


def fp8_lora(
    x_d: Tensor,
    layout: Layout,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """y_i = W_i x + scale * B_i A_i x of each layer, for frozen W in e4m3 or NF4.

    x_d (..., D) and the results (..., O_i) are bf16. A (R_i, D) and B (O_i, R_i) are those of the
    layers that have a delta, and get gradients in their own dtype. `weights` are those of
    `Fp8Weight.tensors` (then `write_delta` must have been told of A and B: their values here serve
    the gradients only), or for storage "nf4" those of `nf4_weights`.
    """
    apply: Callable[..., tuple[Tensor, ...]] = _Fp8Lora.apply
    a_rd = [torch.cat([a.to(x_d.dtype) for a in lora_a])] if lora_a else []
    b_or = [b.to(x_d.dtype) for b in lora_b]
    parts = apply(layout, len(weights), x_d.reshape(-1, x_d.shape[-1]), *weights, *a_rd, *b_or)
    return tuple(part.view(*x_d.shape[:-1], part.shape[1]) for part in parts)
