"""A served base at 8 bits: frozen linear layers, kept and multiplied in e4m3.

Weights are e4m3 with one scale an output row (Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433), a byte a parameter; their inputs are quantised row by row on the
way. A product is `codes_x @ codes_w^T * scale_x * scale_w`, which a Hopper GPU does at twice bf16's
rate. It is served and not trained over: nothing here has a gradient. Training's products in 8 bits
are int8's (`int8_rows.py`).

Layers that read the same input (q, k and v; gate and up) are one product: their weights stand one
below the other.

Shape legend: S tokens, D features in, O features out (of all layers).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunefork.kernels.compiled import is_on_gpu
from tunefork.kernels.e4m3 import E4M3, as_codes, quantize_rows, row_scale


@torch.no_grad()
def fp8_weight(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Codes (O, D) e4m3 and scales (1, O) fp32 of weights (O_i, D), one below the other."""
    scales = [row_scale(weight) for weight in tensors]
    # One at a time: the fp32 form of a layer is four times its codes. As bytes: PyTorch does not
    # concatenate e4m3 everywhere.
    codes = [as_codes(*both).view(torch.uint8) for both in zip(tensors, scales, strict=True)]
    return torch.cat(codes).view(E4M3), torch.cat(scales).view(1, -1)


def fp8_dense(codes_od: Tensor, scale_1o: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (O, D) that the codes of `fp8_weight`, or some of its rows, stand for."""
    return (codes_od.float() * scale_1o.t()).to(dtype)


def fp8_linear(
    x_d: Tensor, codes_od: Tensor, scale_1o: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    """y_i = W_i x of each layer, (..., O_i) bf16, for x (..., D) bf16 and codes and scales of
    `fp8_weight`; `sizes` are the O_i.

    D and O must be multiples of 16.
    """
    codes_sd, scale_s1 = quantize_rows(x_d.reshape(-1, x_d.shape[-1]))
    y_so = scaled_mm(codes_sd, codes_od, scale_s1, scale_1o)
    return torch.split(y_so.view(*x_d.shape[:-1], y_so.shape[1]), list(sizes), dim=-1)


def scaled_mm(a_mk: Tensor, b_nk: Tensor, scale_m1: Tensor, scale_1n: Tensor) -> Tensor:
    """(a * scale_m1) @ (b * scale_n)^T in bf16, for e4m3 operands and fp32 scales.

    K and N must be multiples of 16. On a GPU partial sums are kept in the tensor cores' own
    accumulator (`use_fast_accum`), which has fewer bits than fp32.
    """
    if is_on_gpu(a_mk):
        return torch._scaled_mm(
            a_mk,
            b_nk.t(),
            scale_a=scale_m1,
            scale_b=scale_1n,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return ((a_mk.float() @ b_nk.float().t()) * scale_m1 * scale_1n).to(torch.bfloat16)
