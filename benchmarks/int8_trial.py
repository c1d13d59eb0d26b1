"""LoRA with int8 products by kernels, put into the engine in FP8's place: how fast it would be.

What `int8_emulated.py` defines, with `h200_products.cu`'s kernel for the products and Triton's for
the codes, MLPs as one function as FP8 has them. `h200_training measure --cases lora_8x2048_fp8
--tools tunefork int8 unsloth` runs it beside FP8. A trial: its operators take what that run gives
them (finite numbers, rows of 16-byte multiples), and nothing else is checked.

While `built` is entered, what `train.precision: fp8` runs for LoRA on a Hopper GPU is this.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.int8_emulated import Rows, kept_in_int8, rounded
from tunefork.kernels import fp8, fp8_gated
from tunefork.kernels.fp8_weight import diagonal
from tunefork.kernels.gated import gated_gradients
from tunefork.kernels.layout import Layout
from tunefork.kernels.lora_gradients import lora_gradients


def built() -> AbstractContextManager[None]:
    """Within, LoRA's frozen base is kept in int8, and its products are the kernel's."""
    return kept_in_int8(
        (fp8, "product_of", product_of),
        (fp8, "input_gradient", input_gradient),
        (fp8_gated, "product_of", product_of),
        (fp8_gated, "_Fp8Gated", _Int8Gated),
    )


def product_of(
    x_sd: Tensor,
    inner_s: Tensor | None,
    squares_s1: Tensor | None,
    layout: Layout,
    weights: Sequence[Tensor],
    lora_b: Sequence[Tensor],
) -> Tensor:
    """As `fp8.product_of`, of a layout with a delta."""
    assert inner_s is not None
    apart_om, probe_md = weights[-2:]
    rows = Rows.of(layout, weights, 0)
    codes_sd, scale_s1 = torch.ops.tunefork_benchmarks.round_apart(x_sd, inner_s, probe_md)
    b_or = diagonal(lora_b, layout) * layout.scale
    beside = torch.cat([b_or, apart_om.float() * rows.scale_1o.t()], dim=1).bfloat16()
    y_so: Tensor = torch.ops.tunefork_benchmarks.product(
        codes_sd, rows.codes_od, inner_s, beside, scale_s1, rows.scale_1o
    )
    return y_so


def input_gradient(
    dys: Sequence[Tensor],
    layout: Layout,
    weights: Sequence[Tensor],
    a_rd: Tensor | None,
    du_sr: Tensor | None,
    features_in: int,
) -> Tensor:
    """As `fp8.input_gradient`, of a layout with a delta."""
    assert a_rd is not None and du_sr is not None
    rows = Rows.of(layout, weights, features_in)
    codes_so, scale_s1 = torch.ops.tunefork_benchmarks.round_rows(list(dys), rows.scale_1o)
    turned_do = torch.ops.tunefork_benchmarks.turned(rows.codes_od)
    dx_sd: Tensor = torch.ops.tunefork_benchmarks.product(
        codes_so, turned_do, du_sr, a_rd.t().contiguous(), scale_s1, None
    )
    return dx_sd


class _Int8Gated(fp8_gated._Fp8Gated):
    """Its backward pass without e4m3's."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_so: Tensor) -> tuple[Tensor | None, ...]:
        pair, last = ctx.pair, ctx.last
        x_sd, u_sr, both_se, u_sq, *tensors = ctx.saved_tensors
        parts = fp8_gated._parts_of(tensors, ctx.num_weights)
        pair_weights, (a_rd, gate_b, up_b, a_qe, b_oq), last_weights = parts
        gate_se, up_se = both_se.chunk(2, dim=1)
        du_sq, [db_oq] = lora_gradients([dy_so], u_sq, [b_oq], last.scale)
        dh_se = input_gradient([dy_so], last, last_weights, a_qe, du_sq, gate_se.shape[1])
        *dys, da_qe = gated_gradients(gate_se, up_se, dh_se, du_sq)
        du_sr, db = lora_gradients(dys, u_sr, [gate_b, up_b], pair.scale)
        dx_sd = None
        if ctx.needs_input_grad[3]:
            dx_sd = input_gradient(dys, pair, pair_weights, a_rd, du_sr, x_sd.shape[1])
        gradients = (du_sr.t() @ x_sd, *db, da_qe, db_oq)
        of_pair, of_last = [None] * len(pair_weights), [None] * len(last_weights)
        return None, None, None, dx_sd, *of_pair, *gradients, *of_last


@cache
def _kernel() -> Callable[..., Tensor]:
    from benchmarks.h200_products import FORMS, Kernel

    with tempfile.TemporaryDirectory() as folder:
        return Kernel(FORMS[0], Path(folder))


@torch.library.custom_op("tunefork_benchmarks::product", mutates_args=())
def _product(
    a: Tensor, b: Tensor, u: Tensor, v: Tensor, scale_m: Tensor, scale_n: Tensor | None
) -> Tensor:
    if not a.is_cuda:
        y_mn = (a.float() @ b.float().t()) * scale_m * (1.0 if scale_n is None else scale_n)
        return (y_mn + u.float() @ v.float().t()).bfloat16()
    y_mn = a.new_empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)
    return _kernel()(a, b, (u.contiguous(), v.contiguous()), scale_m, scale_n, y_mn)


@_product.register_fake
def _(
    a: Tensor, b: Tensor, u: Tensor, v: Tensor, scale_m: Tensor, scale_n: Tensor | None
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)


@torch.library.custom_op("tunefork_benchmarks::round_rows", mutates_args=())
def _round_rows(parts: Sequence[Tensor], fold: Tensor) -> tuple[Tensor, Tensor]:
    if not fold.is_cuda:
        codes, scales = rounded(torch.cat(list(parts), dim=1).float() * fold)
        return codes.to(torch.int8), scales
    from benchmarks.int8_rows_triton import round_rows

    return round_rows(parts, fold)


@_round_rows.register_fake
def _(parts: Sequence[Tensor], fold: Tensor) -> tuple[Tensor, Tensor]:
    size = sum(part.shape[1] for part in parts)
    return (
        parts[0].new_empty(parts[0].shape[0], size, dtype=torch.int8),
        parts[0].new_empty(parts[0].shape[0], 1, dtype=torch.float32),
    )


@torch.library.custom_op("tunefork_benchmarks::round_apart", mutates_args=())
def _round_apart(x: Tensor, inner: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    if not x.is_cuda:
        codes, scales = rounded(x.float() - inner[:, -len(probe) :].float() @ probe.float())
        return codes.to(torch.int8), scales
    from benchmarks.int8_rows_triton import round_apart

    return round_apart(x, inner, probe)


@_round_apart.register_fake
def _(x: Tensor, inner: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("tunefork_benchmarks::turned", mutates_args=())
def _turned(codes: Tensor) -> Tensor:
    if not codes.is_cuda:
        return codes.t().contiguous()
    from benchmarks.int8_rows_triton import turned

    return turned(codes)


@_turned.register_fake
def _(codes: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[1], codes.shape[0])
