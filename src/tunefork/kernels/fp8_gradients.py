"""All that an FP8 LoRA's backward pass makes of dy, from one reading: codes, du, and B's gradient.

`e4m3.quantize_rows` reads dy for the input's gradient, and `lora_gradients` for the delta's: 2 x
45 GB in a step of 16,384 tokens of an 8B model. The first must know a row's largest number before
its first code. Here the scale is known before, from the row's length: no number of dy * fold
exceeds it, and none of du exceeds it times a length of B's columns (Cauchy-Schwarz: du_r = scale *
sum over o of (dy_o fold_o) (B_or / fold_o)). What that takes in precision `e4m3_apart.py` says;
whoever makes dy has the length at hand. The bound on du is of the worst case: the longest column
raises every scale, by 10 where a delta is as large as the weight, by 258 where a tenth of the
weight's rows are next to nothing (their fold is small, and B / fold large). Codes lose precision
where that takes them below 2**-6: in the latter dx's error went from 4.37 to 4.95 %. Rows shorter
than `LEAST_LENGTH` lose theirs, and of one longer than 1e19 the length is infinite.

On a Hopper GPU with many tokens it is one kernel a layer (`kernels/fp8_gradients_triton.py`); the
definition is here, and runs elsewhere.

Shape legend: S tokens, O_i features out of a layer, R_i its rank, O and R their sums, P columns of
the widened part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunefork.kernels.compiled import compiled_on_cuda, is_on_gpu
from tunefork.kernels.e4m3 import E4M3, LARGEST, LOW, joined, left_columns
from tunefork.kernels.e4m3_apart import LEAST_LENGTH
from tunefork.kernels.lora_gradients import (
    LARGEST_RANK,
    is_worth_a_kernel,
    lora_gradients_reference,
)

_ROUNDED = 1 + 2.0**-6
"""What du, rounded to bf16 twice and summed in fp32, may exceed its bound by: more than enough."""
_STEP = 16
"""Codes are written 8 or 16 at a time where their rows are multiples of this apart."""


@compiled_on_cuda()
def gradient_scale(
    length_s1: Tensor,
    lora_b: Sequence[Tensor],
    lora_scale: float,
    fold_1o: Tensor,
    balance: Tensor,
) -> Tensor:
    """(S, 1), fp32, the least power of two that takes all that `gradient_codes` writes to 448 at
    most, whatever dy is but for its lengths.

    `length` (S, 1), fp32, is the Euclidean length of each row of dy * fold, of all layers
    together; `fold` (1, O) fp32 is positive. Plain PyTorch, so that the compiler computes it where
    it computes the length. Of a length that is not finite, nor is it.
    """
    folds = torch.split(fold_1o, [b.shape[0] for b in lora_b], dim=1)
    lengths = [
        (b.float() / fold.t()).square().sum(0).amax().sqrt()
        for b, fold in zip(lora_b, folds, strict=True)
    ]
    longest = torch.stack(lengths).amax() * (abs(lora_scale) * _ROUNDED) * balance
    least_s1 = length_s1.clamp(min=LEAST_LENGTH) * longest.clamp(min=1.0) / LARGEST
    return torch.exp2(torch.ceil(torch.log2(least_s1)))


def gradient_codes(
    dys: Sequence[Tensor],
    u_sr: Tensor,
    lora_b: Sequence[Tensor],
    lora_scale: float,
    fold_1o: Tensor,
    scale_s1: Tensor,
    balance: Tensor,
    width: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Codes [dy * fold / scale | du high | du low | du high / 16 | zeros], (S, O + P), e4m3; du =
    [lora_scale * dy_i B_i], (S, R); and each lora_scale * dy_i^T u_i, (O_i, R_i).

    `dys` (S, O_i), u (S, R) and B_i (O_i, R_i), a delta of each layer, are of one dtype: du's and
    the gradients', which are those of `lora_gradients`. `fold` (1, O) and `scale` (S, 1) are fp32,
    the latter a power of two; in codes du is multiplied by `balance` () first. P is `width`, 3 R at
    least. What exceeds `scale` saturates.
    """
    if is_on_gpu(dys[0]) and dys[0].dtype == torch.bfloat16:
        codes, du_sr, *db = torch.ops.tunefork.gradient_codes(
            list(dys), u_sr, list(lora_b), lora_scale, fold_1o, scale_s1, balance, width
        )
        return codes, du_sr, db
    return gradient_codes_reference(
        dys, u_sr, lora_b, lora_scale, fold_1o, scale_s1, balance, width
    )


def gradient_codes_reference(
    dys: Sequence[Tensor],
    u_sr: Tensor,
    lora_b: Sequence[Tensor],
    lora_scale: float,
    fold_1o: Tensor,
    scale_s1: Tensor,
    balance: Tensor,
    width: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The definition of `gradient_codes`."""
    du_sr, db = lora_gradients_reference(dys, u_sr, lora_b, lora_scale)
    inverse_s1 = scale_s1.reciprocal()
    folds = torch.split(fold_1o, [dy.shape[1] for dy in dys], dim=1)
    columns = [
        (dy.float() * fold * inverse_s1).clamp(-LARGEST, LARGEST).to(E4M3)
        for dy, fold in zip(dys, folds, strict=True)
    ]
    columns += left_columns(du_sr.float() * balance * inverse_s1)
    columns.append(du_sr.new_zeros(len(du_sr), width - 3 * du_sr.shape[1], dtype=torch.uint8))
    return joined(columns).view(E4M3), du_sr, db


@torch.library.custom_op("tunefork::gradient_codes", mutates_args=(), device_types="cuda")
def _gradient_codes(
    dys: Sequence[Tensor],
    u: Tensor,
    lora_b: Sequence[Tensor],
    lora_scale: float,
    fold: Tensor,
    scale: Tensor,
    balance: Tensor,
    width: int,
) -> list[Tensor]:
    # Needs Triton, which comes with CUDA.
    from tunefork.kernels.fp8_gradients_triton import delta_columns, launch, simple_codes

    codes = u.new_empty(u.shape[0], fold.shape[1] + width, dtype=E4M3)
    inverse = scale.reciprocal().contiguous()
    # Asked in here, where it is no question of torch.compile's: one form serves all lengths.
    is_narrow = max(b.shape[1] for b in lora_b) <= LARGEST_RANK
    if is_narrow and codes.shape[1] % _STEP == 0 and is_worth_a_kernel(dys):
        du_sr, *db = launch(dys, u, lora_b, lora_scale, fold, inverse, codes)
    else:
        du_sr, db = lora_gradients_reference(dys, u, lora_b, lora_scale)
        simple_codes(dys, fold, inverse, codes)
    delta = codes[:, fold.shape[1] :]
    delta_columns(du_sr, inverse, balance, delta, largest_code=LARGEST, low_factor=LOW)
    return [codes, du_sr, *db]


@_gradient_codes.register_fake
def _(
    dys: Sequence[Tensor],
    u: Tensor,
    lora_b: Sequence[Tensor],
    lora_scale: float,
    fold: Tensor,
    scale: Tensor,
    balance: Tensor,
    width: int,
) -> list[Tensor]:
    codes = u.new_empty(u.shape[0], fold.shape[1] + width, dtype=E4M3)
    return [codes, u.new_empty(u.shape), *(b.new_empty(b.shape) for b in lora_b)]
