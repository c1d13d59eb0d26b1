"""A frozen NF4 base as an operand of an int8 product: made anew for each, in one pass.

Unpacking to bf16, rounding to int8 and turning are three passes over a weight as PyTorch has them,
7.5 bytes a parameter, three times a step where layers are recomputed. One kernel
(`nf4_int8_triton.py`) reads half a byte and writes one. What rounds the rows is made once: a
block's absolute maximum is one of its values, so a row's largest magnitude is the largest of its
blocks'.

Codes are the nearest: half a step is a 254th of the row's largest magnitude, where NF4's own least
step is a 13th of the block's.

The definition is here, in PyTorch, and runs elsewhere; so it does for rows that are no whole number
of blocks, where a block lies in two.

Shape legend: O features out (of all layers), D features in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tunefork.kernels.compiled import is_on_gpu
from tunefork.kernels.int8_rows import nearest, scale_of
from tunefork.kernels.quantized import BLOCK, dequantize_nf4_tensors, nf4_maxima, nf4_values


@torch.no_grad()
def nf4_scales(tensors: Sequence[Tensor], sizes: Sequence[int], features_in: int) -> Tensor:
    """(2, O) fp32: the rows' scales and their inverse, of the `nf4_tensors` of each layer (O_i, D),
    one after the other.

    A block of zeros counts with what its maximum is kept as, in 8 bits, which need not be 0.
    """
    if features_in % BLOCK:
        weight_od = dequantize_nf4_tensors(tensors, sizes, features_in, torch.bfloat16)
        largest = [weight_od.abs().amax(1, keepdim=True)]
    else:
        maxima = (nf4_maxima(tensors[5 * at : 5 * at + 5]) for at in range(len(sizes)))
        largest = [
            of_blocks.view(size, -1).abs().amax(1, keepdim=True)
            for of_blocks, size in zip(maxima, sizes, strict=True)
        ]
    # As bf16 holds it, in which the weight is.
    scale_o1 = scale_of(torch.cat(largest).bfloat16().float())
    return torch.cat([scale_o1, scale_o1.reciprocal()], dim=1).t().contiguous()


@dataclass(frozen=True, slots=True)
class Nf4Rows:
    """Weights (O_i, D) one below the other."""

    tensors: Sequence[Tensor]
    """The `nf4_tensors` of each."""
    scales_2o: Tensor
    """Their `nf4_scales`."""
    sizes: Sequence[int]
    features_in: int

    @property
    def scale_1o(self) -> Tensor:
        """(1, O) fp32"""
        return self.scales_2o[:1]

    def codes(self) -> Tensor:
        """(O, D) int8: weight / scale."""
        if self._has_kernel():
            return torch.ops.tunefork.nf4_int8(*self._operands())  # type: ignore[no-any-return]
        return self._codes_od()

    def codes_turned(self) -> Tensor:
        """(D, O) int8: the same, transposed, contiguous."""
        if self._has_kernel():
            return torch.ops.tunefork.nf4_int8_turned(*self._operands())  # type: ignore[no-any-return]
        return self._codes_od().t().contiguous()

    def _codes_od(self) -> Tensor:
        sizes, size = self.sizes, self.features_in
        weight_od = dequantize_nf4_tensors(self.tensors, sizes, size, torch.bfloat16)
        return nearest(weight_od, self.scale_1o.t())

    def _has_kernel(self) -> bool:
        return is_on_gpu(self.scales_2o) and self.features_in % BLOCK == 0

    def _operands(self) -> tuple[list[Tensor], Tensor, int]:
        return list(self.tensors), self.scales_2o[1], self.features_in


@cache
def _values(device: torch.device) -> Tensor:
    return nf4_values().to(device)


@torch.library.custom_op("tunefork::nf4_int8", mutates_args=(), device_types="cuda")
def _codes(tensors: Sequence[Tensor], inverse: Tensor, features_in: int) -> Tensor:
    from tunefork.kernels.nf4_int8_triton import launch  # needs Triton, which comes with CUDA

    out = inverse.new_empty(inverse.shape[0], features_in, dtype=torch.int8)
    launch(tensors, inverse, _values(inverse.device), out, block=BLOCK)
    return out


@_codes.register_fake
def _(tensors: Sequence[Tensor], inverse: Tensor, features_in: int) -> Tensor:
    return inverse.new_empty(inverse.shape[0], features_in, dtype=torch.int8)


@torch.library.custom_op("tunefork::nf4_int8_turned", mutates_args=(), device_types="cuda")
def _codes_turned(tensors: Sequence[Tensor], inverse: Tensor, features_in: int) -> Tensor:
    from tunefork.kernels.nf4_int8_triton import launch_turned

    out = inverse.new_empty(features_in, inverse.shape[0], dtype=torch.int8)
    launch_turned(tensors, inverse, _values(inverse.device), out, block=BLOCK)
    return out


@_codes_turned.register_fake
def _(tensors: Sequence[Tensor], inverse: Tensor, features_in: int) -> Tensor:
    return inverse.new_empty(features_in, inverse.shape[0], dtype=torch.int8)
