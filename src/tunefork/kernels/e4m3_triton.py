"""The kernel of `kernels/e4m3.py`: a row's largest magnitude and its codes in one pass, the row in
registers between the two."""

import triton
import triton.language as tl
from torch import Tensor

from tunefork.kernels.int8_rows_triton import magnitude, scale_of


@triton.jit
def _quantize_rows(
    x, stride, codes, scales,
    size: tl.constexpr, block: tl.constexpr, least: tl.constexpr, largest: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    inside = column < size
    values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(magnitude(values), axis=0), least, largest)
    tl.store(scales + row, scale)
    units = values * (1.0 / scale)
    tl.store(codes + row * size + column, units.to(tl.float8e4nv), mask=inside)


def quantize_rows(
    x_sd: Tensor, codes_sd: Tensor, scale_s1: Tensor, *, least: float, largest: float
) -> None:
    """Fill codes and scales, contiguous, as `e4m3.quantize_rows` says, whose LEAST and LARGEST
    `least` and `largest` are."""
    x_sd = x_sd if x_sd.stride(1) == 1 else x_sd.contiguous()
    size = x_sd.shape[1]
    _quantize_rows[(len(codes_sd),)](
        x_sd, x_sd.stride(0), codes_sd, scale_s1,
        size, triton.next_power_of_2(size), least, largest,
        num_warps=4,  # measured on an H200: more are slower at 4,096 columns, and at 28,672
    )  # fmt: skip
