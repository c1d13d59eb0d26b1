"""LoRA with int8 products, emulated: what issue 6's gate would say of a form that is not built.

Once the main directions of a layer's inputs are multiplied apart (`kernels/directions.py`), what is
left of x, and W, have no outliers, which is what e4m3's exponents are for. Here x less those
directions, W and dy are rounded to the nearest of 255 whole numbers, a scale a row; nothing is
drawn at random. The delta and the directions are added as products in bf16, as a kernel could that
goes on from the same accumulators. Sums of whole numbers are made by products of floats, which is
exact (fp32 holds whole numbers up to 2**24; a sum over 576 values of SmolLM2-135M has 9.3 million
at most, one over 1,536 may be rounded in its last bit) and slow: it says how int8 trains, not how
fast.

While `emulated` is entered, what `train.precision: fp8` runs for LoRA is this.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tunefork.kernels import fp8, fp8_weight
from tunefork.kernels.fp8_weight import diagonal
from tunefork.kernels.layout import Layout
from tunefork.model import gated

LARGEST = 127
_LEAST = 1e-30


Replacement = tuple[Any, str, Any]
"""A module, a name in it, and what stands there instead."""


def emulated() -> AbstractContextManager[None]:
    """Within, LoRA's frozen base is kept in int8, and its products are int8's."""
    return kept_in_int8(
        (fp8, "product_of", product_of),
        (fp8, "input_gradient", input_gradient),
        (gated, "takes_fp8", lambda *_: False),  # MLPs as one function have e4m3's kernels
    )


@contextmanager
def kept_in_int8(*products: Replacement) -> Iterator[None]:
    """Within, LoRA's frozen base is kept in int8, and multiplied by these `products`."""
    with ExitStack() as stack:
        for module, name, other in (
            (fp8_weight, "e4m5_weight", int8_weight),
            (fp8_weight, "e4m5_dense", int8_dense),
            (fp8_weight, "rows_of", Rows.of),
            *products,
        ):
            stack.enter_context(patch.object(module, name, other))
        yield


class Rows:
    """A weight as `fp8_weight.rows_of` gives it: its codes and their scales."""

    def __init__(self, codes_od: Tensor, scale_1o: Tensor) -> None:
        self.codes_od, self.scale_1o = codes_od, scale_1o

    @classmethod
    def of(cls, layout: Layout, weights: Sequence[Tensor], features_in: int) -> "Rows":
        return cls(weights[0], weights[2][:1])


def rounded(rows_sd: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of at most 127, fp32, and the scale of each row, (S, 1)."""
    scale_s1 = rows_sd.abs().amax(1, keepdim=True).clamp(min=_LEAST) / LARGEST
    return torch.round(rows_sd / scale_s1), scale_s1


def int8_weight(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """In place of `e4m5_weight`: codes, nothing, and scales over their inverses (2, O)."""
    pairs = [rounded(weight.float()) for weight in tensors]
    codes_od = torch.cat([codes.to(torch.int8) for codes, _ in pairs])
    scale_o1 = torch.cat([scale for _, scale in pairs])
    both = torch.cat([scale_o1, scale_o1.reciprocal()], dim=1).t().contiguous()
    return codes_od, codes_od.new_zeros(1), both


def int8_dense(codes_od: Tensor, _: Tensor, scale_o: Tensor, dtype: torch.dtype) -> Tensor:
    """In place of `e4m5_dense`."""
    return (codes_od.float() * scale_o[:, None]).to(dtype)


def product_of(
    x_sd: Tensor,
    inner_s: Tensor | None,
    squares_s1: Tensor | None,
    layout: Layout,
    weights: Sequence[Tensor],
    lora_b: Sequence[Tensor],
) -> Tensor:
    """As `fp8.product_of`."""
    apart_om, probe_md = weights[-2:]
    rows = Rows.of(layout, weights, 0)
    rest_sd = x_sd.float()
    if inner_s is not None and layout.apart:
        rest_sd = rest_sd - inner_s[:, -layout.apart :].float() @ probe_md.float()
    codes_sd, scale_s1 = rounded(rest_sd)
    y_so = sums(codes_sd, rows.codes_od) * scale_s1 * rows.scale_1o
    if inner_s is not None:
        beside = apart_om.float() * rows.scale_1o.t()
        if layout.rank:
            beside = torch.cat([diagonal(lora_b, layout) * layout.scale, beside], dim=1)
        y_so = y_so + sums(inner_s, beside)
    return y_so.bfloat16()


def input_gradient(
    dys: Sequence[Tensor],
    layout: Layout,
    weights: Sequence[Tensor],
    a_rd: Tensor | None,
    du_sr: Tensor | None,
    features_in: int,
) -> Tensor:
    """As `fp8.input_gradient`."""
    rows = Rows.of(layout, weights, features_in)
    # The scales lie along the dimension that is summed over now: dy takes them.
    codes_so, scale_s1 = rounded(torch.cat(list(dys), dim=1).float() * rows.scale_1o)
    dx_sd = sums(codes_so, rows.codes_od.t()) * scale_s1
    if du_sr is not None and a_rd is not None:
        dx_sd = dx_sd + sums(du_sr, a_rd.t())
    return dx_sd.bfloat16()


def sums(a_mk: Tensor, b_nk: Tensor) -> Tensor:
    """a b^T of what bf16 holds, summed in fp32: (M, N) fp32."""
    found: Tensor = torch.ops.tunefork_benchmarks.sums(a_mk.bfloat16(), b_nk.bfloat16())
    return found


# An operator: on a GPU its result is fp32 where its operands are bf16, which has no derivative.
@torch.library.custom_op("tunefork_benchmarks::sums", mutates_args=())
def _sums(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return a.float() @ b.float().t()


@_sums.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.float32)
