"""The LoRA linear over a frozen FP8 base, with the delta inside the same matrix product.

The base is quantised once: e4m3 with one scale an output row (Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433), and a second copy, quantised along its columns, for the input's
gradient. Activations and their gradients are quantised row by row on the way, so a product is
`codes_x @ codes_w^T * scale_x * scale_w`, which a Hopper GPU does at twice bf16's rate.

The delta rides along. Adding `scale * (x A^T) B^T` to y afterwards reads and writes y once more,
which for 8B-sized layers costs as much as a quarter of the product itself. Instead the operands are
widened, [x | u] [W | scale B]^T with u = x A^T, and the product's inner dimension grows by a few
columns. Three bits of mantissa would be too few for u and B, whose small updates are the training;
each is written as high + low, two e4m3 numbers, and the product as
high*high + low*high + high*low, which keeps about as many bits as bf16 does.

Shape legend: S tokens, D features in, O features out, R rank, P columns of the widened part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""e4m3's largest value."""

_LOW = 16.0
"""The low part is kept times this, so that it lies where e4m3 has all its bits: high's rounding
error is at most 2**-4 of high."""

_STEP = 64
"""The widened part is filled up to a multiple of this. A GEMM on Hopper takes the inner dimension
in such pieces, and is slower than without the part where it ends inside one (measured on an H200:
K + 48 costs 13 to 29 %, K + 64 at most 5 %)."""


def quantize_rows(x_sd: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (S, D) in e4m3 and scales (S, 1) in fp32, with codes * scale close to `x_sd`.

    The scale takes a row's largest magnitude to 448; a row of zeros has a tiny one.
    """
    scale_s1 = _row_scale(x_sd)
    return (x_sd.float() / scale_s1).to(E4M3), scale_s1


def scaled_mm(a_mk: Tensor, b_nk: Tensor, scale_m1: Tensor, scale_1n: Tensor) -> Tensor:
    """(a * scale_m1) @ (b * scale_n)^T in bf16, for e4m3 operands and fp32 scales.

    K and N must be multiples of 16. On a GPU partial sums are kept in the tensor cores' own
    accumulator (`use_fast_accum`), which has fewer bits than fp32.
    """
    if a_mk.device.type == "cuda":
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
    """A frozen (O, D) weight in e4m3, widened by P columns for a delta, in both directions."""

    codes_op: Tensor
    """(O, D + P): the weight, then what `write_delta` puts there for the forward product."""
    scale_1o: Tensor
    codes_dp: Tensor
    """(D, O + P): the same weight transposed and quantised along its columns, for the input's
    gradient."""
    scale_1d: Tensor
    balance: Tensor
    """() fp32, a power of two, at least 1: taken from B and given to u where B would overflow."""
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        """(O, D)"""
        return self.codes_op.shape[0], self.codes_dp.shape[0]


@torch.no_grad()
def quantize_weight(weight_od: Tensor, *, rank: int) -> Fp8Weight:
    """`weight_od` in e4m3, with room for a delta of `rank`, which is zero until written."""
    width = -(-3 * rank // _STEP) * _STEP

    def widened(w: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantize_rows(w)
        room = torch.zeros(w.shape[0], w.shape[1] + width, dtype=torch.uint8, device=w.device)
        room[:, : w.shape[1]] = codes.view(torch.uint8)
        return room.view(E4M3), scale.t().contiguous()

    codes_op, scale_1o = widened(weight_od)
    codes_dp, scale_1d = widened(weight_od.t().contiguous())
    balance = torch.ones((), device=weight_od.device)
    return Fp8Weight(codes_op, scale_1o, codes_dp, scale_1d, balance, rank)


@torch.no_grad()
def write_delta(weight: Fp8Weight, lora_a_rd: Tensor, lora_b_or: Tensor, scale: float) -> None:
    """Put scale * B beside the weight and A beside its transpose, after each change of theirs."""
    features_out, features_in = weight.shape
    b_or = lora_b_or.float() * scale / weight.scale_1o.t()
    excess = (b_or.abs().amax() / LARGEST).clamp(min=1.0)
    weight.balance.copy_(torch.exp2(torch.ceil(torch.log2(excess))))
    a_dr = lora_a_rd.float().t() / weight.scale_1d.t()
    for codes, start, part in (
        (weight.codes_op, features_in, b_or / weight.balance),
        (weight.codes_dp, features_out, a_dr),
    ):
        high, low = _split(part)
        beside = torch.cat([high, high.float().div(_LOW).to(E4M3), low], dim=1)
        codes.view(torch.uint8)[:, start : start + 3 * weight.rank] = beside.view(torch.uint8)


def _row_scale(x_sd: Tensor) -> Tensor:
    return x_sd.abs().amax(-1, keepdim=True).float().clamp(min=1e-30) / LARGEST


def _split(wide: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as high + low / 16, both in e4m3; beyond its range it saturates."""
    wide = wide.clamp(-LARGEST, LARGEST)
    high = wide.to(E4M3)
    return high, ((wide - high.float()) * _LOW).to(E4M3)


def _widen(x_sd: Tensor, u_sr: Tensor, balance: Tensor | float, width: int) -> tuple[Tensor, Tensor]:
    """[x | u high | u low | u high / 16 | zeros], (S, D + width), over one scale a row."""
    u_sr = u_sr.float() * balance
    scale_s1 = torch.maximum(_row_scale(x_sd), _row_scale(u_sr))
    high, low = _split(u_sr / scale_s1)
    parts = [(x_sd.float() / scale_s1).to(E4M3), high, low, high.float().div(_LOW).to(E4M3)]
    if spare := width - 3 * u_sr.shape[1]:
        parts.append(x_sd.new_zeros(x_sd.shape[0], spare, dtype=E4M3))
    # As bytes: PyTorch does not concatenate e4m3 everywhere.
    return torch.cat([p.view(torch.uint8) for p in parts], dim=1).view(E4M3), scale_s1


class _Fp8LoraLinear(torch.autograd.Function):
    # Tensors one by one: torch.compile follows no other arguments into a Function.
    @staticmethod
    def forward(
        ctx: Any,
        x_sd: Tensor,
        a_rd: Tensor,
        b_or: Tensor,
        codes_op: Tensor,
        scale_1o: Tensor,
        codes_dp: Tensor,
        scale_1d: Tensor,
        balance: Tensor,
        scale: float,
    ) -> Tensor:
        u_sr = x_sd @ a_rd.t()
        wide, scale_s1 = _widen(x_sd, u_sr, balance, codes_op.shape[1] - x_sd.shape[1])
        ctx.save_for_backward(x_sd, u_sr, a_rd, b_or, codes_dp, scale_1d)
        ctx.scale = scale
        return scaled_mm(wide, codes_op, scale_s1, scale_1o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_so: Tensor) -> tuple[Tensor | None, ...]:
        x_sd, u_sr, a_rd, b_or, codes_dp, scale_1d = ctx.saved_tensors
        du_sr = (dy_so @ b_or) * ctx.scale
        dx_sd = None
        if ctx.needs_input_grad[0]:
            wide, scale_s1 = _widen(dy_so, du_sr, 1.0, codes_dp.shape[1] - dy_so.shape[1])
            dx_sd = scaled_mm(wide, codes_dp, scale_s1, scale_1d)
        da_rd, db_or = du_sr.t() @ x_sd, (dy_so.t() @ u_sr) * ctx.scale
        return dx_sd, da_rd, db_or, None, None, None, None, None, None


def fp8_lora_linear(
    x_d: Tensor, weight: Fp8Weight, lora_a_rd: Tensor, lora_b_or: Tensor, scale: float
) -> Tensor:
    """y = W x + scale * B A x for a frozen W in e4m3, whose delta `write_delta` has written.

    x_d (..., D) and the result (..., O) are bf16; A (R, D) and B (O, R) get gradients in their own
    dtype. Their values serve the gradients only: y takes B from `weight`.
    """
    apply: Callable[..., Tensor] = _Fp8LoraLinear.apply
    y_so = apply(
        x_d.reshape(-1, x_d.shape[-1]),
        lora_a_rd.to(x_d.dtype),
        lora_b_or.to(x_d.dtype),
        weight.codes_op,
        weight.scale_1o,
        weight.codes_dp,
        weight.scale_1d,
        weight.balance,
        scale,
    )
    return y_so.view(*x_d.shape[:-1], -1)
