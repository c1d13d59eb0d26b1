"""A frozen weight for int8 products: how it is kept, and its codes when it is multiplied.

Kept are the codes and a scale a row, or NF4's four bits, of which codes are made anew for each
product (`nf4_int8.py`); beside them what `directions.py` multiplies apart. What the product does
with that is in `int8.py`; the shape legend too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tunefork.kernels.directions import along, main_directions
from tunefork.kernels.int8_product import NARROW_STEP
from tunefork.kernels.int8_rows import rounded, turned
from tunefork.kernels.layout import Layout
from tunefork.kernels.nf4_int8 import Nf4Rows, nf4_scales
from tunefork.kernels.quantized import dequantize_nf4_tensors


class Rows(Protocol):
    """A weight (O, D) as an operand."""

    @property
    def scale_1o(self) -> Tensor:
        """(1, O) fp32"""

    def codes(self) -> Tensor:
        """(O, D) int8: weight / scale."""

    def codes_turned(self) -> Tensor:
        """(D, O) int8: the same, transposed."""


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Codes that are kept."""

    codes_od: Tensor
    scales_2o: Tensor

    @property
    def scale_1o(self) -> Tensor:
        return self.scales_2o[:1]

    def codes(self) -> Tensor:
        return self.codes_od

    def codes_turned(self) -> Tensor:
        return turned(self.codes_od)


@torch.no_grad()
def int8_weights(tensors: Sequence[Tensor], layout: Layout, features_in: int) -> tuple[Tensor, ...]:
    """What is kept of frozen weights: `num_kept` tensors of `layout`'s storage, scales and their
    inverse (2, O), and W V and V^T of `directions.py`, zeros until `set_apart`.

    `tensors` are the `nf4_tensors` of each layer, or its weight (O_i, D).
    """
    kept: tuple[Tensor, ...]
    match layout.storage:
        case "nf4":
            kept, scales_2o = tuple(tensors), nf4_scales(tensors, layout.sizes, features_in)
        case "int8":
            # One at a time: the fp32 form of a layer is four times its codes.
            pairs = [rounded(weight) for weight in tensors]
            kept = (torch.cat([codes for codes, _ in pairs]),)
            scale_1o = torch.cat([scale for _, scale in pairs]).t()
            scales_2o = torch.cat([scale_1o, scale_1o.reciprocal()]).contiguous()
        case _:
            raise ValueError(f"a base kept in {layout.storage} has no int8 products")
    rows, device = sum(layout.sizes), scales_2o.device
    return (
        *kept,
        scales_2o,
        torch.zeros(rows, layout.apart, dtype=torch.bfloat16, device=device),
        torch.zeros(layout.apart, features_in, dtype=torch.bfloat16, device=device),
    )


def num_kept(layout: Layout) -> int:
    """Of the tensors of `int8_weights`, those that hold the weight."""
    return 5 * len(layout.sizes) if layout.storage == "nf4" else 1


def rows_of(layout: Layout, weights: Sequence[Tensor], features_in: int) -> Rows:
    """Of `int8_weights`."""
    count = num_kept(layout)
    if layout.storage == "nf4":
        return Nf4Rows(weights[:count], weights[count], layout.sizes, features_in)
    return KeptRows(weights[0], weights[1])


def dense(
    layout: Layout,
    weights: Sequence[Tensor],
    features_in: int,
    dtype: torch.dtype,
    first: int,
    last: int,
) -> Tensor:
    """The weights of layers `first` to `last` (exclusive), one below the other, in `dtype`; of
    `int8_weights`, or of an NF4 base's `nf4_tensors`.

    Of int8's codes, and along the main directions, where a product is what it is told of them, of
    that: nearer to what was rounded than codes alone.
    """
    if layout.storage == "nf4":
        own = weights[5 * first : 5 * last]
        return dequantize_nf4_tensors(own, layout.sizes[first:last], features_in, dtype)
    rows = slice(layout.bounds[first][0], layout.bounds[last - 1][1])
    codes_od, scales_2o, apart_om, probe_md = weights
    weight_od = codes_od[rows].float() * scales_2o[0, rows, None]
    missing_om = apart_om[rows].float() - weight_od @ probe_md.float().t()
    return weight_od.addmm_(missing_om, probe_md.float()).to(dtype)


@torch.no_grad()
def set_apart(
    x_sd: Tensor, weights: Sequence[Tensor], layout: Layout, exact: Sequence[Tensor] = ()
) -> None:
    """Have `int8_weights` multiply the main directions of inputs like `x_sd` apart: with `exact`,
    the weights (O_i, D) that were rounded, wherever they are; without, with what is kept."""
    probe_md = main_directions(x_sd, layout.apart).t().bfloat16()
    apart_om, kept_md = weights[-2:]
    for at, (first, last) in enumerate(layout.bounds):  # a group's fp32 form is large
        if exact:
            weight_od = exact[at].to(x_sd.device)
        else:
            weight_od = dense(layout, weights, x_sd.shape[1], torch.bfloat16, at, at + 1)
        apart_om[first:last] = along(weight_od, probe_md)
    kept_md.copy_(probe_md)


def diagonal(lora_b: Sequence[Tensor], layout: Layout) -> Tensor:
    """B of each layer on the diagonal of an (O, R) matrix."""
    rest, rows, start = list(lora_b), [], 0
    for size, rank in zip(layout.sizes, layout.ranks, strict=True):
        after = layout.rank - start - rank
        if rank:
            b = rest.pop(0)
            rows.append(torch.cat([b.new_zeros(size, start), b, b.new_zeros(size, after)], dim=1))
        else:
            rows.append(lora_b[0].new_zeros(size, layout.rank))
        start += rank
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def padded(narrow: Tensor, dim: int) -> Tensor:
    """`narrow` with zeros up to a size that products take, in dimension 0 or 1."""
    missing = -narrow.shape[dim] % NARROW_STEP
    if not missing:
        return narrow
    return F.pad(narrow, (0, missing) if dim else (0, 0, 0, missing))
