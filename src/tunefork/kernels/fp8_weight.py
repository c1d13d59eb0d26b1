"""A frozen weight for FP8 products: its e4m3 form, and what stands beside it for the delta.

What the product does with them is in `fp8.py`; the shape legend too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunefork.kernels.compiled import compiled_on_cuda
from tunefork.kernels.e4m3 import (
    E4M3,
    LARGEST,
    LOW,
    as_codes,
    joined,
    row_scale,
    split,
    weight_scales,
)
from tunefork.kernels.fp8_correction import correction
from tunefork.kernels.layout import Layout
from tunefork.kernels.nf4_e4m3 import Nf4Rows, nf4_scales
from tunefork.kernels.quantized import dequantize_nf4_tensors


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
    """What is kept of an NF4 base: the `nf4_tensors` of each layer, their `nf4_scales`, a seed, and
    of a `Correction` that corrects nothing the directions apart, the columns' bytes, and the probe.
    """
    rows, device = sum(layout.sizes), tensors[0].device
    return (
        *tensors,
        nf4_scales(tensors, layout.sizes, features_in),
        torch.zeros(1, dtype=torch.int32, device=device),
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
    rows = nf4_rows(layout, weights, size)
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
    b_or = diagonal(lora_b, layout) * layout.scale / scale_1o.t()
    balance = balance_of(b_or)
    return joined(right_columns(b_or / balance)), balance


@compiled_on_cuda(dynamic=False)
def _a_columns(lora_a: tuple[Tensor, ...], scale_1d: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of A's columns (D, 3R), and the balance."""
    a_dr = torch.cat(lora_a).float().t() / scale_1d.t()
    balance = balance_of(a_dr)
    return joined(right_columns(a_dr / balance)), balance


def balance_of(delta: Tensor) -> Tensor:
    excess = (delta.abs().amax() / LARGEST).clamp(min=1.0)
    return torch.exp2(torch.ceil(torch.log2(excess)))


def diagonal(lora_b: Sequence[Tensor], layout: Layout) -> Tensor:
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


def right_columns(wide: Tensor) -> list[Tensor]:
    """The right operand's columns of the delta: high | high / 16 | low."""
    high, low = split(wide)
    return [high, high.float().div(LOW).to(E4M3), low]


def nf4_rows(layout: Layout, weights: Sequence[Tensor], features_in: int) -> Nf4Rows:
    """Of `nf4_weights`."""
    count = 5 * len(layout.sizes)
    return Nf4Rows(weights[:count], weights[count], weights[count + 1], layout.sizes, features_in)


def with_seed(weights: Sequence[Tensor], layout: Layout, seed: Tensor) -> tuple[Tensor, ...]:
    """`nf4_weights` that are rounded at random by the first number of `seed`, int32."""
    at = 5 * len(layout.sizes) + 1
    return (*weights[:at], seed, *weights[at + 1 :])
