"""Rows in e4m3 with the part along a few directions taken out of them: x - z V in one pass.

`directions.py` takes the inputs' main directions V out of x before it is rounded, and has them
multiplied apart. Written to memory, x - z V costs three passes over x (a copy, a product that adds
to it, and the rounding); here x is read once and its codes are written, as if nothing were taken
out. For that a row's scale must be known before x - z V is. V is orthonormal, so no number of it
exceeds x's length (but by bf16's rounding of z and V, and what exceeds the scale saturates), and
that is at hand where x is made.

A length may be sqrt(D) times the largest number. In a floating format that takes no precision until
numbers fall under 2**-6 of the scale, e4m3's last power of two. These are off by 2**-10 of it each
at most, and it is at most a 224th of the length; so a row is off by sqrt(D) 2**-10 / 224 of its
length: 2.8e-4 where D is 4,096, 5.2e-4 where it is 14,336. Beside the 2.6 % of the rest of x that
three bits of mantissa take anyway, this shows where the rest is under 2 % of x.

The scale is a power of two. So where sums in another order move numbers of x by a bit of bf16, the
codes of those move and no others: with a scale of the largest number, or the length, all do. Two
ways to compute a small model's logits ended half as far from each other so. It takes a little: the
largest number itself, which a scale made of it holds exactly, is rounded too. Where few numbers
have most of a row, that shows: SmolLM2-135M's down errs by 2.00 % for 1.93, its other layers alike.

On a GPU it is one kernel (`kernels/e4m3_apart_triton.py`); the definition is here, and runs
elsewhere.

Shape legend as in `kernels/e4m3.py`; m directions apart, R the rank.
"""

import torch
from torch import Tensor

from tunefork.kernels.compiled import compiled_on_cuda, is_on_gpu
from tunefork.kernels.e4m3 import E4M3, LARGEST, LOW, joined, left_columns

LEAST_LENGTH = 1e-18
"""What the length of a row of zeros is taken for: fp32 holds the square of nothing much smaller."""


@compiled_on_cuda()
def apart_scale(
    x_sd: Tensor, inner_sr: Tensor, balance: Tensor, squares_s1: Tensor | None = None
) -> Tensor:
    """(S, 1), fp32, a power of two: takes x's length, and the largest of inner * balance, to 224 at
    least and 448 at most.

    Plain PyTorch, so that the compiler computes it where it computes x; or `squares` (S, 1), fp32,
    is the sum of each row's, from who made x. Of a row longer than 1.8e19, whose square fp32 does
    not hold, it is infinite, and the row's product no number.
    """
    if squares_s1 is None:
        squares_s1 = x_sd.float().square().sum(-1, keepdim=True)
    length_s1 = squares_s1.sqrt()
    largest_s1 = (inner_sr.float() * balance).abs().amax(-1, keepdim=True)
    least_s1 = torch.maximum(length_s1, largest_s1).clamp(min=LEAST_LENGTH) / LARGEST
    return torch.exp2(torch.ceil(torch.log2(least_s1)))


def quantize_apart(
    x_sd: Tensor,
    inner_sr: Tensor,
    apart: int,
    probe_md: Tensor,
    balance: Tensor,
    scale_s1: Tensor,
    width: int,
) -> Tensor:
    """Codes [(x - z V) / scale | inner high | inner low | inner high / 16 | zeros], (S, D + P).

    z are the last m = `apart` columns of `inner` (S, R + m), V (m, D) is `probe`; these and x are
    bf16. `inner` is multiplied by `balance` () first; P is `width`. `scale` is that of
    `apart_scale`; what exceeds it saturates. m and D are multiples of 16.
    """
    if is_on_gpu(x_sd):
        return torch.ops.tunefork.quantize_apart(  # type: ignore[no-any-return]
            x_sd, inner_sr, apart, probe_md, balance, scale_s1, width
        )
    return quantize_apart_reference(x_sd, inner_sr, apart, probe_md, balance, scale_s1, width)


def quantize_apart_reference(
    x_sd: Tensor,
    inner_sr: Tensor,
    apart: int,
    probe_md: Tensor,
    balance: Tensor,
    scale_s1: Tensor,
    width: int,
) -> Tensor:
    """The definition of `quantize_apart`."""
    inverse_s1 = scale_s1.reciprocal()
    rest_sd = x_sd.float() - inner_sr[:, -apart:].float() @ probe_md.float()
    columns = [(rest_sd * inverse_s1).clamp(-LARGEST, LARGEST).to(E4M3)]
    columns += left_columns(inner_sr.float() * balance * inverse_s1)
    filling = width - 3 * inner_sr.shape[1]
    columns.append(x_sd.new_zeros(len(x_sd), filling, dtype=torch.uint8))
    return joined(columns).view(E4M3)


@torch.library.custom_op("tunefork::quantize_apart", mutates_args=(), device_types="cuda")
def _quantize_apart(
    x: Tensor,
    inner: Tensor,
    apart: int,
    probe: Tensor,
    balance: Tensor,
    scale: Tensor,
    width: int,
) -> Tensor:
    from tunefork.kernels.e4m3_apart_triton import launch  # needs Triton, which comes with CUDA

    codes = _empty(x, width)
    return launch(
        x, inner, apart, probe, balance, scale, codes, largest_code=LARGEST, low_factor=LOW
    )


@_quantize_apart.register_fake
def _(
    x: Tensor,
    inner: Tensor,
    apart: int,
    probe: Tensor,
    balance: Tensor,
    scale: Tensor,
    width: int,
) -> Tensor:
    return _empty(x, width)


def _empty(x: Tensor, width: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] + width, dtype=E4M3)
