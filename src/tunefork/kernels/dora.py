"""The DoRA linear layer with a frozen base, as one autograd function.

    y = g * (W x + scale * B A x) + bias,  g = m / ||W + scale * B A||  by row  (Liu et al. 2024,
    https://arxiv.org/abs/2402.09353, eq. 5; the norm is a constant to the gradient: section 4.3)

The PEFT library materialises B A for the norm, as large as W. Here the norm is expanded,

    ||w + s b A||^2 = ||w||^2 + 2 s (W A^T) . b + s^2 b (A A^T) b^T,

in fp32, of which only (O, R) and (R, R) products are new at each step. The sum cancels where the
delta undoes a row: its relative error is about 2^-24 (||w|| + s ||b A||)^2 / ||w + s b A||^2.
Undoing half of a row costs some three of 24 bits, and undoing 97 % of it still leaves more than
bf16's 8. A row shorter than 2^-10 of its parts is kept at that: the expansion cannot tell it from
zero.

Shape legend as in `reference.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunefork.kernels.lora import add_product

_CHUNK = 1 << 22
"""Elements of W that are widened to fp32 at a time: 16 MiB."""
_SHORTEST = 2.0**-20
"""Least share of its parts that a squared norm may be."""


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_sd: Tensor,
        weight: Callable[[], Tensor],
        bias_o: Tensor | None,
        lora_a_rd: Tensor,
        lora_b_or: Tensor,
        magnitude_o: Tensor,
        scale: float,
        squares_o: Tensor,
    ) -> Tensor:
        a_rd, b_or = lora_a_rd.to(x_sd.dtype), lora_b_or.to(x_sd.dtype)
        weight_od = weight()
        norm_o = row_norms(weight_od, lora_a_rd, lora_b_or, scale, squares_o)
        xa_sr = x_sd @ a_rd.t()
        u_so = add_product((xa_sr * scale) @ b_or.t(), x_sd, weight_od.t())
        gain_o = (magnitude_o / norm_o).to(x_sd.dtype)
        ctx.save_for_backward(x_sd, xa_sr, a_rd, b_or, u_so, gain_o, norm_o)
        ctx.weight, ctx.scale = weight, scale
        ctx.dtypes = (lora_a_rd.dtype, lora_b_or.dtype, magnitude_o.dtype)
        return u_so * gain_o if bias_o is None else torch.addcmul(bias_o, u_so, gain_o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_so: Tensor) -> tuple[Tensor | None, ...]:
        x_sd, xa_sr, a_rd, b_or, u_so, gain_o, norm_o = ctx.saved_tensors
        dm_o = None
        if ctx.needs_input_grad[5]:
            dm_o = ((dy_so * u_so).sum(0, dtype=norm_o.dtype) / norm_o).to(ctx.dtypes[2])
        du_so = dy_so * gain_o
        du_b_sr = (du_so @ b_or) * ctx.scale
        da_rd = (du_b_sr.t() @ x_sd).to(ctx.dtypes[0]) if ctx.needs_input_grad[3] else None
        db_or = (
            (du_so.t() @ xa_sr).to(ctx.dtypes[1]) * ctx.scale if ctx.needs_input_grad[4] else None
        )
        dx_sd = None
        if ctx.needs_input_grad[0]:
            dx_sd = add_product(du_b_sr @ a_rd, du_so, ctx.weight())
        return dx_sd, None, None, da_rd, db_or, dm_o, None, None


def dora_linear(
    x_d: Tensor,
    weight: Callable[[], Tensor],
    bias_o: Tensor | None,
    lora_a_rd: Tensor,
    lora_b_or: Tensor,
    magnitude_o: Tensor,
    scale: float,
    squares_o: Tensor,
) -> Tensor:
    """y = m / ||W + scale B A|| * (W + scale B A) x + bias, where W is frozen.

    As `lora.lora_linear`; m (O,) gets a gradient too. `squares_o` is `row_squares(weight())`.
    """
    apply: Callable[..., Tensor] = _DoraLinear.apply
    x_sd = x_d.reshape(-1, x_d.shape[-1])
    y_so = apply(x_sd, weight, bias_o, lora_a_rd, lora_b_or, magnitude_o, scale, squares_o)
    return y_so.view(*x_d.shape[:-1], y_so.shape[1])


@torch.no_grad()
def row_squares(weight_od: Tensor) -> Tensor:
    """||w||^2 of each row: (O,), fp32 or wider."""
    return torch.cat([rows.square().sum(1) for rows in _widened(weight_od)])


@torch.no_grad()
def row_norms(
    weight_od: Tensor, lora_a_rd: Tensor, lora_b_or: Tensor, scale: float, squares_o: Tensor
) -> Tensor:
    """||W + scale B A|| of each row without its materialisation: (O,), in `squares_o`'s dtype."""
    a_rd, b_or = lora_a_rd.to(squares_o.dtype), lora_b_or.to(squares_o.dtype)
    wa_or = torch.cat([rows @ a_rd.t() for rows in _widened(weight_od)])
    cross_o = 2 * scale * (wa_or * b_or).sum(1)
    delta_o = scale**2 * ((b_or @ (a_rd @ a_rd.t())) * b_or).sum(1)
    least_o = (_SHORTEST * (squares_o + delta_o)).clamp_min(torch.finfo(squares_o.dtype).tiny)
    return torch.maximum(squares_o + cross_o + delta_o, least_o).sqrt()


def _widened(weight_od: Tensor) -> Iterator[Tensor]:
    """Rows of W in fp32 at least, some at a time."""
    dtype = torch.promote_types(weight_od.dtype, torch.float32)
    at_a_time = max(1, _CHUNK // weight_od.shape[1])
    return (rows.to(dtype) for rows in torch.split(weight_od, at_a_time))
