"""A frozen NF4 base as an operand of an FP8 product: made anew for each, in one pass.

Unpacking to bf16, finding each row's largest magnitude, rounding to e4m3, turning and putting the
delta's columns beside it are half a dozen passes over a weight as PyTorch has them, 17 bytes a
parameter, three times a step where layers are recomputed. One kernel (`nf4_e4m3_triton.py`) reads
half a byte and writes one. A row's largest magnitude needs no reading: a block's absolute maximum
is one of its values, so a row's is the largest of its blocks', a sixty-fourth of the data.

The definition is here, in PyTorch, and runs elsewhere; so it does for rows that are no whole number
of blocks, where a block lies in two.

Shape legend as in `kernels/fp8.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tunefork.kernels.compiled import is_on_gpu
from tunefork.kernels.e4m3 import E4M3, LARGEST, LEAST, as_codes, joined, row_scale, weight_scales
from tunefork.kernels.quantized import BLOCK, dequantize_nf4_tensors, nf4_maxima, nf4_values


@dataclass(frozen=True, slots=True)
class Nf4Rows:
    """Weights (O_i, D) one below the other, as `nf4_tensors` keeps them, and what rounds them."""

    tensors: Sequence[Tensor]
    """Five of each layer."""
    sizes: Sequence[int]
    features_in: int
    maxima: Sequence[Tensor]
    """Of each layer's blocks, (O_i D / 64,) fp32."""
    scale_o1: Tensor
    """(O, 1) fp32."""

    def codes(self, beside_op: Tensor | None = None) -> Tensor:
        """(O, D + P) e4m3: weight / scale, and `beside` (O, P), bytes, to its right."""
        if self._has_kernel():
            return torch.ops.tunefork.nf4_codes(*self._operands(), beside_op)  # type: ignore[no-any-return]
        codes_od = as_codes(self._weight_od(), self.scale_o1)
        return codes_od if beside_op is None else joined([codes_od, beside_op]).view(E4M3)

    def codes_turned(self, beside_dp: Tensor | None = None) -> Tensor:
        """(D, O + P) e4m3: the same codes transposed, and `beside` (D, P), bytes."""
        if self._has_kernel():
            return torch.ops.tunefork.nf4_codes_turned(*self._operands(), beside_dp)  # type: ignore[no-any-return]
        codes_do = self.codes().view(torch.uint8).t().contiguous()
        return joined([codes_do, *([] if beside_dp is None else [beside_dp])]).view(E4M3)

    def _weight_od(self) -> Tensor:
        return dequantize_nf4_tensors(self.tensors, self.sizes, self.features_in, torch.bfloat16)

    def _has_kernel(self) -> bool:
        return is_on_gpu(self.scale_o1) and self.features_in % BLOCK == 0

    def _operands(self) -> tuple[list[Tensor], list[Tensor], Tensor, int]:
        packed = [self.tensors[5 * index] for index in range(len(self.sizes))]
        return packed, list(self.maxima), self.scale_o1.reciprocal(), self.features_in


def nf4_rows(tensors: Sequence[Tensor], sizes: Sequence[int], features_in: int) -> Nf4Rows:
    """Of the `nf4_tensors` of each layer, one after the other; what follows them is not read."""
    tensors = tensors[: 5 * len(sizes)]
    maxima = [nf4_maxima(tensors[5 * index : 5 * index + 5]) for index in range(len(sizes))]
    if features_in % BLOCK:
        weight_od = dequantize_nf4_tensors(tensors, sizes, features_in, torch.bfloat16)
        rows = [row_scale(weight_od)]
    else:
        # As bf16 holds it, in which the weight is.
        largest = [
            each.view(size, -1).abs().amax(1, keepdim=True)
            for each, size in zip(maxima, sizes, strict=True)
        ]
        rows = [each.bfloat16().float().clamp(min=LEAST) / LARGEST for each in largest]
    return Nf4Rows(tensors, sizes, features_in, maxima, weight_scales(rows))


@cache
def _values(device: torch.device) -> Tensor:
    return nf4_values().to(device)


@torch.library.custom_op("tunefork::nf4_codes", mutates_args=(), device_types="cuda")
def _codes(
    packed: Sequence[Tensor],
    maxima: Sequence[Tensor],
    inverse: Tensor,
    features_in: int,
    beside: Tensor | None,
) -> Tensor:
    from tunefork.kernels.nf4_e4m3_triton import launch  # needs Triton, which comes with CUDA

    out = _empty(inverse, features_in, beside)
    launch(
        packed, maxima, inverse, _values(inverse.device), out, features_in=features_in, block=BLOCK
    )
    if beside is not None:
        out.view(torch.uint8)[:, features_in:] = beside
    return out


@_codes.register_fake
def _(
    packed: Sequence[Tensor],
    maxima: Sequence[Tensor],
    inverse: Tensor,
    features_in: int,
    beside: Tensor | None,
) -> Tensor:
    return _empty(inverse, features_in, beside)


def _empty(inverse: Tensor, features_in: int, beside: Tensor | None) -> Tensor:
    width = 0 if beside is None else beside.shape[1]
    return inverse.new_empty(inverse.shape[0], features_in + width, dtype=E4M3)


@torch.library.custom_op("tunefork::nf4_codes_turned", mutates_args=(), device_types="cuda")
def _codes_turned(
    packed: Sequence[Tensor],
    maxima: Sequence[Tensor],
    inverse: Tensor,
    features_in: int,
    beside: Tensor | None,
) -> Tensor:
    from tunefork.kernels.nf4_e4m3_triton import launch_turned

    out = _empty_turned(inverse, features_in, beside)
    launch_turned(
        packed, maxima, inverse, _values(inverse.device), out, features_in=features_in, block=BLOCK
    )
    if beside is not None:
        out.view(torch.uint8)[:, inverse.shape[0] :] = beside
    return out


@_codes_turned.register_fake
def _(
    packed: Sequence[Tensor],
    maxima: Sequence[Tensor],
    inverse: Tensor,
    features_in: int,
    beside: Tensor | None,
) -> Tensor:
    return _empty_turned(inverse, features_in, beside)


def _empty_turned(inverse: Tensor, features_in: int, beside: Tensor | None) -> Tensor:
    width = 0 if beside is None else beside.shape[1]
    return inverse.new_empty(features_in, inverse.shape[0] + width, dtype=E4M3)
