"""All that an int8 LoRA's backward pass makes of dy, from one reading: codes, du, and B's gradient.

`int8_rows.round_rows` reads dy for the input's gradient, and `lora_gradients` for the delta's: 2 x
45 GB in a step of 16,384 tokens of an 8B model. The first must know a row's largest number before
its first code. Here it is known before: whoever makes dy has the numbers at hand
(`gated.gated_gradients_and_maxima`).

On a Hopper GPU with many tokens it is one kernel a layer (`kernels/int8_gradients_triton.py`); the
definition is here, and runs elsewhere.

Shape legend: S tokens, O_i features out of a layer, R_i its rank, O and R their sums.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunefork.kernels.compiled import is_on_gpu
from tunefork.kernels.int8_rows import nearest, scale_of
from tunefork.kernels.lora_gradients import (
    LARGEST_RANK,
    is_worth_a_kernel,
    lora_gradients_reference,
)


def gradient_codes(
    dys: Sequence[Tensor],
    u_sr: Tensor,
    lora_b: Sequence[Tensor],
    lora_scale: float,
    fold_1o: Tensor,
    most_s1: Tensor,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Codes of [dy_i * fold], (S, O) int8, and their scales (S, 1) fp32; du = [lora_scale * dy_i
    B_i], (S, R); and each lora_scale * dy_i^T u_i, (O_i, R_i).

    `dys` (S, O_i), u (S, R) and B_i (O_i, R_i), a delta of each layer, are of one dtype: du's and
    the gradients', which are those of `lora_gradients`. `fold` (1, O) is fp32. `most` (S, 1) fp32
    is the largest magnitude of each row of [dy_i * fold], which one scale takes to 127; of codes
    that exceed it nothing is said. Where it is infinite or NaN, so is the scale.
    """
    if is_on_gpu(dys[0]) and dys[0].dtype == torch.bfloat16:
        codes_so, scale_s1, du_sr, *db = torch.ops.tunefork.int8_gradient_codes(
            list(dys), u_sr, list(lora_b), lora_scale, fold_1o, most_s1
        )
        return codes_so, scale_s1, du_sr, db
    return gradient_codes_reference(dys, u_sr, lora_b, lora_scale, fold_1o, most_s1)


def gradient_codes_reference(
    dys: Sequence[Tensor],
    u_sr: Tensor,
    lora_b: Sequence[Tensor],
    lora_scale: float,
    fold_1o: Tensor,
    most_s1: Tensor,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The definition of `gradient_codes`."""
    du_sr, db = lora_gradients_reference(dys, u_sr, lora_b, lora_scale)
    scale_s1 = scale_of(most_s1)
    whole_so = torch.cat([dy.float() for dy in dys], dim=1) * fold_1o
    return nearest(whole_so, scale_s1), scale_s1, du_sr, db


@torch.library.custom_op("tunefork::int8_gradient_codes", mutates_args=(), device_types="cuda")
def _gradient_codes(
    dys: Sequence[Tensor],
    u: Tensor,
    lora_b: Sequence[Tensor],
    lora_scale: float,
    fold: Tensor,
    most: Tensor,
) -> list[Tensor]:
    # Needs Triton, which comes with CUDA.
    from tunefork.kernels.int8_gradients_triton import launch, simple_codes

    codes = u.new_empty(u.shape[0], fold.shape[1], dtype=torch.int8)
    scale = scale_of(most.contiguous())
    inverse = scale.reciprocal()
    # Asked in here, where it is no question of torch.compile's: one form serves all lengths.
    is_narrow = max(b.shape[1] for b in lora_b) <= LARGEST_RANK
    if is_narrow and is_worth_a_kernel(dys):
        du_sr, *db = launch(dys, u, lora_b, lora_scale, fold, inverse, codes)
    else:
        du_sr, db = lora_gradients_reference(dys, u, lora_b, lora_scale)
        simple_codes(dys, fold, inverse, codes)
    return [codes, scale, du_sr, *db]


@_gradient_codes.register_fake
def _(
    dys: Sequence[Tensor],
    u: Tensor,
    lora_b: Sequence[Tensor],
    lora_scale: float,
    fold: Tensor,
    most: Tensor,
) -> list[Tensor]:
    codes = u.new_empty(u.shape[0], fold.shape[1], dtype=torch.int8)
    of_deltas = [u.new_empty(u.shape), *(b.new_empty(b.shape) for b in lora_b)]
    return [codes, most.new_empty(most.shape), *of_deltas]
