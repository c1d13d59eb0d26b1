"""A frozen weight in ten bits, of which each pass draws eight: e4m5 kept, e4m3 multiplied.

FP8's e4m3 has three bits of mantissa. Rounded to the nearest once, a weight errs the same way in
every step, and what A and B learn of that gathers: SmolLM2-135M lost 1.3 % by being fine-tuned so;
with this and directions apart it is about 0.2 % (docs/fp8.md). Two bits more of mantissa are kept,
and every pass rounds them away at random, up or down with the probability that keeps the mean
(stochastic rounding: Gupta et al. 2015, https://arxiv.org/abs/1502.02551): what one step errs,
others take back. Four steps do so exactly: they share a random number r of 0 to 3 and draw by
r + turn, modulo 4, each with another turn (a Cranley-Patterson rotation, SIAM J. Numer. Anal. 13,
1976), so that a weight with k quarters goes up in k of the four. The forward pass and the input's
gradient draw apart from each other; a layer that is run again draws what it drew.

Magnitudes of a float format are ordered as their bits are, so a ten-bit weight is its e4m3 code,
cut off, and two bits of how far it is to the next; drawing adds 1 to the code where they and two
random bits come to 4 or more. Four weights lie in a word and are drawn together. The two bits of
columns q, q + D / 4, q + D / 2 and q + 3 D / 4 share byte q, so that they are read as words too.

The kernels are in `e4m5_triton.py`; the definition is here, and runs elsewhere.

Shape legend as in `kernels/fp8.py`; Q = D / 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunefork.kernels.adamw import mix
from tunefork.kernels.compiled import compiled_on_cuda, is_on_gpu
from tunefork.kernels.e4m3 import E4M3, joined, row_scale, weight_scales

_PARTS = 4
"""Quarters of a row, whose two bits share a byte."""
_AT_A_TIME = 2**24
"""Weights that are made ten bits."""
_LARGEST = 126 << 2
"""e4m3's largest magnitude, 448, in ten bits."""


def e4m5_weight(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`weights` (O_i, D) one below the other: e4m3 codes cut off (O, D) uint8, two more bits of
    each (O, Q) uint8, and scales with their inverse (2, O) fp32. D is a multiple of 16."""
    scale_o1 = weight_scales([row_scale(weight) for weight in weights])
    scales_2o = torch.cat([scale_o1, scale_o1.reciprocal()], dim=1).t().contiguous()
    inverses = torch.split(scales_2o[1], [len(weight) for weight in weights])
    found = list[tuple[Tensor, Tensor]]()
    for weight, own in zip(weights, inverses, strict=True):
        # Some rows at a time: on the way a weight takes thirty bytes.
        size = max(1, _AT_A_TIME // weight.shape[1])
        found += map(_ten_bits, torch.split(weight, size), torch.split(own, size))
    high, low = (torch.cat(parts) for parts in zip(*found, strict=True))
    return high, low, scales_2o


def _ten_bits(weight_od: Tensor, inverse_o: Tensor) -> tuple[Tensor, Tensor]:
    units = weight_od.float() * inverse_o[:, None]
    # Below 2**-6 the steps are those that the format has there.
    exponent = (units.view(torch.int32) >> 23 & 0xFF).clamp(min=127 - 6)
    per_step = (259 - exponent << 23).view(torch.float32)
    # As many steps below the exponent's own as 2**5; each exponent has as many more.
    magnitude = (units.abs() * per_step).round().int() + (exponent - 121) * 32
    magnitude = magnitude.clamp(max=_LARGEST)
    sign = units.view(torch.int32) >> 31 & 1
    high_od = (sign << 7 | magnitude >> 2).to(torch.uint8)
    first, second, third, fourth = (magnitude & 3).chunk(_PARTS, dim=1)
    return high_od, (first | second << 2 | third << 4 | fourth << 6).to(torch.uint8)


@compiled_on_cuda()
def e4m5_dense(high_od: Tensor, low_oq: Tensor, scale_o: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (O, D) in `dtype`."""
    low = torch.cat([low_oq.int() >> 2 * part & 3 for part in range(_PARTS)], dim=1)
    magnitude = (high_od.int() & 0x7F) << 2 | low
    units = ((magnitude << 18) + (120 << 23)).view(torch.float32)
    # Those with no exponent count from zero.
    units = torch.where(magnitude < 32, 2 * units - 2.0**-6, units)
    signed = torch.where(high_od > 127, -units, units)
    return (signed * scale_o[:, None]).to(dtype)


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """Weights (O_i, D) one below the other."""

    high_od: Tensor
    low_oq: Tensor
    scales_2o: Tensor
    """As of `e4m5_weight`."""
    seed: Tensor
    """(4,) int32, on the device: the first is drawn by for the input's gradient, the second for
    y; the third's last two bits are the turn of both."""

    @property
    def scale_1o(self) -> Tensor:
        """(1, O) fp32"""
        return self.scales_2o[:1]

    def codes(self, beside_op: Tensor | None = None) -> Tensor:
        """(O, D + P) e4m3: a draw of weight / scale, and `beside` (O, P), bytes, to its right."""
        if is_on_gpu(self.high_od):
            return torch.ops.tunefork.e4m5_codes(self.high_od, self.low_oq, self.seed, beside_op)  # type: ignore[no-any-return]
        codes_od = drawn(self.high_od, self.low_oq, self.seed[1], self.seed[2])
        return joined([codes_od, *([] if beside_op is None else [beside_op])]).view(E4M3)

    def codes_turned(self, beside_dp: Tensor | None = None) -> Tensor:
        """(D, O + P) e4m3: another draw, transposed, and `beside` (D, P)."""
        if is_on_gpu(self.high_od):
            return torch.ops.tunefork.e4m5_codes_turned(  # type: ignore[no-any-return]
                self.high_od, self.low_oq, self.seed, beside_dp
            )
        codes_do = drawn(self.high_od, self.low_oq, self.seed[0], self.seed[2]).t().contiguous()
        return joined([codes_do, *([] if beside_dp is None else [beside_dp])]).view(E4M3)


def drawn(high_od: Tensor, low_oq: Tensor, seed: Tensor, turn: Tensor) -> Tensor:
    """e4m3 codes (O, D), bytes; `seed` and `turn` () int32. Sixteen weights share a hash of their
    place."""
    rows, quarter = low_oq.shape
    place = torch.arange(rows * quarter // 4, dtype=torch.int32, device=high_od.device)
    bits_oq = mix(place ^ seed).view(rows, -1).view(torch.uint8)
    turn = turn.to(torch.uint8)
    carries = [
        ((low_oq >> 2 * part & 3) + ((bits_oq >> 2 * part) + turn & 3)) >> 2
        for part in range(_PARTS)
    ]
    return high_od + torch.cat(carries, dim=1)


@torch.library.custom_op("tunefork::e4m5_codes", mutates_args=(), device_types="cuda")
def _codes(high: Tensor, low: Tensor, seed: Tensor, beside: Tensor | None) -> Tensor:
    from tunefork.kernels.e4m5_triton import launch  # needs Triton, which comes with CUDA

    out = _empty(high, beside)
    launch(high, low, seed, beside, out)
    return out


@_codes.register_fake
def _(high: Tensor, low: Tensor, seed: Tensor, beside: Tensor | None) -> Tensor:
    return _empty(high, beside)


def _empty(high: Tensor, beside: Tensor | None) -> Tensor:
    width = 0 if beside is None else beside.shape[1]
    return high.new_empty(high.shape[0], high.shape[1] + width, dtype=E4M3)


@torch.library.custom_op("tunefork::e4m5_codes_turned", mutates_args=(), device_types="cuda")
def _codes_turned(high: Tensor, low: Tensor, seed: Tensor, beside: Tensor | None) -> Tensor:
    from tunefork.kernels.e4m5_triton import launch_turned

    out = _empty(high.t(), beside)
    launch_turned(high, low, seed, beside, out)
    return out


@_codes_turned.register_fake
def _(high: Tensor, low: Tensor, seed: Tensor, beside: Tensor | None) -> Tensor:
    return _empty(high.t(), beside)
