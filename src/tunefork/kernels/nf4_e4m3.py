"""A frozen NF4 base as an operand of an FP8 product: made anew for each, in one pass.

Unpacking to bf16, finding each row's largest magnitude, rounding to e4m3, turning and putting the
delta's columns beside it are half a dozen passes over a weight as PyTorch has them, 17 bytes a
parameter, three times a step where layers are recomputed. One kernel (`nf4_e4m3_triton.py`) reads
half a byte and writes one. What rounds the rows is made once: a block's absolute maximum is one of
its values, so a row's largest magnitude is the largest of its blocks'.

A weight is rounded at random, to either code beside it, the nearer one the more often, so that the
mean over passes is the weight (stochastic rounding: Gupta et al. 2015,
https://arxiv.org/abs/1502.02551). The nearest code's error would be the same in every step, and
what A and B learn of it gathers: trained so, SmolLM2-135M ended 0.4 % worse (docs/fp8.md).
The weight is made anew each time, so drawing costs a few operations on what lies in registers.

The definition is here, in PyTorch, and runs elsewhere; so it does for rows that are no whole number
of blocks, where a block lies in two.

Shape legend as in `kernels/fp8.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tunefork.kernels.adamw import mix
from tunefork.kernels.compiled import is_on_gpu
from tunefork.kernels.e4m3 import E4M3, LARGEST, LEAST, joined, row_scale, weight_scales
from tunefork.kernels.quantized import BLOCK, dequantize_nf4_tensors, nf4_maxima, nf4_values


@torch.no_grad()
def nf4_scales(tensors: Sequence[Tensor], sizes: Sequence[int], features_in: int) -> Tensor:
    """(2, O) fp32: the rows' scales and their inverse, of the `nf4_tensors` of each layer (O_i, D),
    one after the other."""
    if features_in % BLOCK:
        weight_od = dequantize_nf4_tensors(tensors, sizes, features_in, torch.bfloat16)
        rows = [row_scale(weight_od)]
    else:
        maxima = (nf4_maxima(tensors[5 * at : 5 * at + 5]) for at in range(len(sizes)))
        largest = (
            of_blocks.view(size, -1).abs().amax(1, keepdim=True)
            for of_blocks, size in zip(maxima, sizes, strict=True)
        )
        # As bf16 holds it, in which the weight is.
        rows = [each.bfloat16().float().clamp(min=LEAST) / LARGEST for each in largest]
    scale_o1 = weight_scales(rows)
    return torch.cat([scale_o1, scale_o1.reciprocal()], dim=1).t().contiguous()


@dataclass(frozen=True, slots=True)
class Nf4Rows:
    """Weights (O_i, D) one below the other."""

    tensors: Sequence[Tensor]
    """The `nf4_tensors` of each."""
    scales_2o: Tensor
    """Their `nf4_scales`."""
    seed: Tensor
    """(4,) int32, on the device: the first is drawn by for the input's gradient, the second for
    y."""
    sizes: Sequence[int]
    features_in: int

    @property
    def scale_1o(self) -> Tensor:
        """(1, O) fp32"""
        return self.scales_2o[:1]

    def codes(self, beside_op: Tensor | None = None) -> Tensor:
        """(O, D + P) e4m3: a draw of weight / scale, and `beside` (O, P), bytes, to its right."""
        if self._has_kernel():
            return torch.ops.tunefork.nf4_codes(*self._operands(), self.seed, beside_op)  # type: ignore[no-any-return]
        codes_od = rounded_at_random(self._units_od(), self.seed[1])
        return codes_od if beside_op is None else joined([codes_od, beside_op]).view(E4M3)

    def codes_turned(self, beside_dp: Tensor | None = None) -> Tensor:
        """(D, O + P) e4m3: another draw, transposed, and `beside` (D, P)."""
        if self._has_kernel():
            return torch.ops.tunefork.nf4_codes_turned(*self._operands(), self.seed, beside_dp)  # type: ignore[no-any-return]
        codes_od = rounded_at_random(self._units_od(), self.seed[0])
        codes_do = codes_od.view(torch.uint8).t().contiguous()
        return joined([codes_do, *([] if beside_dp is None else [beside_dp])]).view(E4M3)

    def _units_od(self) -> Tensor:
        sizes, size = self.sizes, self.features_in
        weight_od = dequantize_nf4_tensors(self.tensors, sizes, size, torch.bfloat16)
        return weight_od.float() * self.scale_1o.t().reciprocal()

    def _has_kernel(self) -> bool:
        return is_on_gpu(self.scales_2o) and self.features_in % BLOCK == 0

    def _operands(self) -> tuple[list[Tensor], Tensor, int]:
        return list(self.tensors), self.scales_2o[1], self.features_in


def rounded_at_random(units_od: Tensor, seed: Tensor) -> Tensor:
    """`units` (O, D), fp32 within +-448, in e4m3: each is the mean of what it may be rounded to.

    A magnitude in steps of e4m3, plus a random number below 1, is cut off to a whole number. Two
    weights share 32 bits, a hash of their place and of `seed` () int32.
    """
    place = torch.arange(units_od.numel(), dtype=torch.int32, device=units_od.device)
    bits = mix(place.view_as(units_od) >> 1 ^ seed)
    is_second = (place & 1).bool().view_as(units_od)
    noise = (torch.where(is_second, bits >> 16, bits) & 0xFFFF).float() * 2.0**-16
    # 3 bits of mantissa; below 2**-6 the steps are those that e4m3 has there.
    exponent = (units_od.view(torch.int32) >> 23 & 0xFF).clamp(min=127 - 6)
    step, per_step = ((power << 23).view(torch.float32) for power in (exponent - 3, 257 - exponent))
    magnitude = ((units_od.abs() * per_step + noise).floor() * step).clamp(max=LARGEST)
    return magnitude.copysign(units_od).to(E4M3)


@cache
def _values(device: torch.device) -> Tensor:
    return nf4_values().to(device)


@torch.library.custom_op("tunefork::nf4_codes", mutates_args=(), device_types="cuda")
def _codes(
    tensors: Sequence[Tensor],
    inverse: Tensor,
    features_in: int,
    seed: Tensor,
    beside: Tensor | None,
) -> Tensor:
    from tunefork.kernels.nf4_e4m3_triton import launch  # needs Triton, which comes with CUDA

    out = _empty(inverse, features_in, beside)
    values = _values(inverse.device)
    launch(tensors, inverse, values, seed, out, features_in=features_in, block=BLOCK)
    if beside is not None:
        out.view(torch.uint8)[:, features_in:] = beside
    return out


@_codes.register_fake
def _(
    tensors: Sequence[Tensor],
    inverse: Tensor,
    features_in: int,
    seed: Tensor,
    beside: Tensor | None,
) -> Tensor:
    return _empty(inverse, features_in, beside)


def _empty(inverse: Tensor, features_in: int, beside: Tensor | None) -> Tensor:
    width = 0 if beside is None else beside.shape[1]
    return inverse.new_empty(inverse.shape[0], features_in + width, dtype=E4M3)


@torch.library.custom_op("tunefork::nf4_codes_turned", mutates_args=(), device_types="cuda")
def _codes_turned(
    tensors: Sequence[Tensor],
    inverse: Tensor,
    features_in: int,
    seed: Tensor,
    beside: Tensor | None,
) -> Tensor:
    from tunefork.kernels.nf4_e4m3_triton import launch_turned

    out = _empty_turned(inverse, features_in, beside)
    values = _values(inverse.device)
    launch_turned(tensors, inverse, values, seed, out, features_in=features_in, block=BLOCK)
    if beside is not None:
        out.view(torch.uint8)[:, inverse.shape[0] :] = beside
    return out


@_codes_turned.register_fake
def _(
    tensors: Sequence[Tensor],
    inverse: Tensor,
    features_in: int,
    seed: Tensor,
    beside: Tensor | None,
) -> Tensor:
    return _empty_turned(inverse, features_in, beside)


def _empty_turned(inverse: Tensor, features_in: int, beside: Tensor | None) -> Tensor:
    width = 0 if beside is None else beside.shape[1]
    return inverse.new_empty(features_in, inverse.shape[0] + width, dtype=E4M3)
