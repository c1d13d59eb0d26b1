"""A frozen weight for FP8 products: how it is kept, and its e4m3 form when it is multiplied.

It is drawn anew for each product, of what is kept of it: NF4's four bits (`nf4_e4m3.py`), or ten
(`e4m5.py`). A server's codes are multiplied as they lie (`KeptRows`). Beside them come the delta's
columns, and those of `directions.py`. What the product does with that is in `fp8.py`; the shape
legend too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tunefork.kernels.directions import along, main_directions
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
from tunefork.kernels.e4m5 import DrawnRows, e4m5_dense, e4m5_weight
from tunefork.kernels.layout import Layout
from tunefork.kernels.nf4_e4m3 import Nf4Rows, nf4_scales
from tunefork.kernels.quantized import dequantize_nf4_tensors


class Rows(Protocol):
    """A weight (O, D) as an operand."""

    @property
    def scale_1o(self) -> Tensor:
        """(1, O) fp32"""

    def codes(self, beside_op: Tensor | None = None) -> Tensor:
        """(O, D + P) e4m3: weight / scale, and `beside` (O, P), bytes, to its right."""

    def codes_turned(self, beside_dp: Tensor | None = None) -> Tensor:
        """(D, O + P) e4m3: weight / scale transposed, and `beside` (D, P)."""


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Codes that are kept."""

    codes_od: Tensor
    scales_2o: Tensor

    @property
    def scale_1o(self) -> Tensor:
        return self.scales_2o[:1]

    def codes(self, beside_op: Tensor | None = None) -> Tensor:
        if beside_op is None:
            return self.codes_od
        return joined([self.codes_od, beside_op]).view(E4M3)

    def codes_turned(self, beside_dp: Tensor | None = None) -> Tensor:
        turned = self.codes_od.view(torch.uint8).t().contiguous()
        return joined([turned, *([] if beside_dp is None else [beside_dp])]).view(E4M3)


@torch.no_grad()
def fp8_weights(tensors: Sequence[Tensor], layout: Layout, features_in: int) -> tuple[Tensor, ...]:
    """What is kept of frozen weights: `num_kept` tensors of `layout`'s storage, scales and their
    inverse (2, O), a seed, and W V and V^T of `directions.py`, zeros until `set_apart`.

    `tensors` are the `nf4_tensors` of each layer, or its weight (O_i, D).
    """
    kept: tuple[Tensor, ...]
    match layout.storage:
        case "nf4":
            kept, scales_2o = tuple(tensors), nf4_scales(tensors, layout.sizes, features_in)
        case "e4m5":
            high_od, low_oq, scales_2o = e4m5_weight(tensors)
            kept = (high_od, low_oq)
        case "fp8":
            scale_o1 = weight_scales([row_scale(weight) for weight in tensors])
            scales_2o = torch.cat([scale_o1, scale_o1.reciprocal()], dim=1).t().contiguous()
            own = torch.split(scale_o1, list(layout.sizes))
            # One at a time: the fp32 form of a layer is four times its codes.
            codes = [as_codes(*both).view(torch.uint8) for both in zip(tensors, own, strict=True)]
            kept = (torch.cat(codes).view(E4M3),)
        case _:
            raise ValueError(f"a base kept in {layout.storage} has no FP8 products")
    rows, device = sum(layout.sizes), scales_2o.device
    return (
        *kept,
        scales_2o,
        torch.zeros(4, dtype=torch.int32, device=device),
        torch.zeros(rows, layout.apart, dtype=torch.bfloat16, device=device),
        torch.zeros(layout.apart, features_in, dtype=torch.bfloat16, device=device),
    )


def num_kept(layout: Layout) -> int:
    """Of the tensors of `fp8_weights`, those that hold the weight."""
    return {"nf4": 5 * len(layout.sizes), "e4m5": 2, "fp8": 1}[layout.storage]


def rows_of(layout: Layout, weights: Sequence[Tensor], features_in: int) -> Rows:
    """Of `fp8_weights`."""
    count = num_kept(layout)
    kept, scales_2o, seed = weights[:count], weights[count], weights[count + 1]
    if layout.storage == "nf4":
        return Nf4Rows(kept, scales_2o, seed, layout.sizes, features_in)
    if layout.storage == "e4m5":
        return DrawnRows(kept[0], kept[1], scales_2o, seed)
    return KeptRows(kept[0], scales_2o)


def dense(
    layout: Layout,
    weights: Sequence[Tensor],
    features_in: int,
    dtype: torch.dtype,
    first: int,
    last: int,
) -> Tensor:
    """The weights of layers `first` to `last` (exclusive), one below the other, in `dtype`; of
    `fp8_weights`, or of an NF4 base's `nf4_tensors`."""
    if layout.storage == "nf4":
        own = weights[5 * first : 5 * last]
        return dequantize_nf4_tensors(own, layout.sizes[first:last], features_in, dtype)
    rows = slice(layout.bounds[first][0], layout.bounds[last - 1][1])
    scale_o = weights[num_kept(layout)][0, rows]
    if layout.storage == "e4m5":
        return e4m5_dense(weights[0][rows], weights[1][rows], scale_o, dtype)
    return (weights[0][rows].float() * scale_o[:, None]).to(dtype)


@torch.no_grad()
def set_apart(
    x_sd: Tensor, weights: Sequence[Tensor], layout: Layout, exact: Sequence[Tensor] = ()
) -> None:
    """Have `fp8_weights` multiply the main directions of inputs like `x_sd` apart: with `exact`,
    the weights (O_i, D) that were made ten bits, wherever they are; without, with what is kept."""
    probe_md = main_directions(x_sd, layout.apart).t().bfloat16()
    scales_o1 = rows_of(layout, weights, x_sd.shape[1]).scale_1o.t()
    apart_om, kept_md = weights[-2:]
    kept_md.copy_(probe_md)
    for at, (first, last) in enumerate(layout.bounds):  # a group's fp32 form is large
        if exact:
            weight_od = exact[at].to(x_sd.device)
        else:
            weight_od = dense(layout, weights, x_sd.shape[1], torch.bfloat16, at, at + 1)
        apart_om[first:last] = along(weight_od, probe_md, scales_o1[first:last])


def balance_of(delta: Tensor) -> Tensor:
    """() fp32, a power of two, at least 1: taken from a delta and given to u where it would
    overflow."""
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


def with_seed(weights: Sequence[Tensor], layout: Layout, seed: Tensor) -> tuple[Tensor, ...]:
    """`fp8_weights` that are drawn by `seed`, (4,) int32."""
    at = num_kept(layout) + 1
    return (*weights[:at], seed, *weights[at + 1 :])
