"""Rows in e4m3: 8-bit floats with 3 bits of mantissa, over one fp32 scale a row.

A server's base at 8 bits is kept so, and its inputs are made so on the way (`fp8.py`), by
`quantize_rows`: on a GPU it is one kernel that reads each row once (`kernels/e4m3_triton.py`); the
definition is here, and runs elsewhere.

A row with a number that is infinite or NaN has a scale that is, and a code that is NaN; no other
row knows of it.

Source of the format: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433.

Shape legend: S tokens, D features.
"""

import torch
from torch import Tensor

from tunefork.kernels.compiled import is_on_gpu

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""e4m3's largest value."""
LEAST = 1e-30
"""What the largest magnitude of a row of zeros is taken for."""


def row_scale(x_sd: Tensor) -> Tensor:
    """(S, 1), fp32: what takes each row's largest magnitude to 448."""
    return x_sd.abs().amax(-1, keepdim=True).float().clamp(min=LEAST) / LARGEST


def as_codes(x_sd: Tensor, scale_s1: Tensor) -> Tensor:
    """x / scale in e4m3."""
    # Times the inverse: a GPU's division takes longer than the memory does. A largest value that
    # comes out a hair above 448 is rounded to it.
    return (x_sd.float() * scale_s1.reciprocal()).to(E4M3)


def quantize_rows(x_sd: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (S, D) e4m3 and scales (S, 1) fp32 of x, bf16."""
    if is_on_gpu(x_sd):
        return torch.ops.tunefork.quantize_rows(x_sd)  # type: ignore[no-any-return]
    return quantize_rows_reference(x_sd)


def quantize_rows_reference(x_sd: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `quantize_rows`."""
    scale_s1 = row_scale(x_sd)
    return as_codes(x_sd, scale_s1), scale_s1


@torch.library.custom_op("tunefork::quantize_rows", mutates_args=(), device_types="cuda")
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    from tunefork.kernels.e4m3_triton import quantize_rows  # needs Triton, which comes with CUDA

    codes, scale = _empty(x)
    if codes.numel():
        quantize_rows(x, codes, scale, least=LEAST, largest=LARGEST)
    return codes, scale


@_quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(x)


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(*x.shape, dtype=E4M3)
    return codes, x.new_empty(x.shape[0], 1, dtype=torch.float32)
