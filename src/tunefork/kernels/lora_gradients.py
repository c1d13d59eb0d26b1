"""What LoRA's backward pass makes of dy, the gradient of a layer's result: du and B's gradient.

Both are products of all of dy with something as narrow as the rank, so reading dy is what they
cost, and two products read it twice: 2 x 45 GB in a step of 16,384 tokens of an 8B model. On a
Hopper GPU one kernel (`kernels/lora_gradients_triton.py`) makes both from one reading where there
are many tokens. The definition is here, and runs elsewhere.

Shape legend: S tokens, O_i features out of a layer, R_i its rank, R their sum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunefork.kernels.compiled import is_on_gpu

LARGEST_RANK = 32
"""Of a layer, for the kernel: at 64 the shares that its programs write are as much as it saves."""
LEAST_TOKENS = 256
"""For the kernel: with fewer, two products take no longer than its two launches."""
_HOPPER = 9
"""Major compute capability that the kernel is cut for: others have less shared memory, or other
tensor cores."""
_STEP = 16
"""dy is copied 16 bytes at a time where its features, stride and address are multiples of this."""


def lora_gradients(
    dys: Sequence[Tensor], u_sr: Tensor, lora_b: Sequence[Tensor], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """du = [scale * dy_i B_i], (S, R), and each scale * dy_i^T u_i, (O_i, R_i).

    `dys` (S, O_i) are the gradients of layers with one input and a delta each; u = [x A_i^T] (S, R)
    and B_i (O_i, R_i) have their dtype, and so have the results. The kernel rounds once, the
    definition also before it scales; both give the same bits each time.
    """
    if is_on_gpu(dys[0]) and _has_kernel(dys[0].dtype, lora_b):
        du_sr, *db = torch.ops.tunefork.lora_gradients(list(dys), u_sr, list(lora_b), scale)
        return du_sr, db
    return lora_gradients_reference(dys, u_sr, lora_b, scale)


def lora_gradients_reference(
    dys: Sequence[Tensor], u_sr: Tensor, lora_b: Sequence[Tensor], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """The definition of `lora_gradients`."""
    us = torch.split(u_sr, [b.shape[1] for b in lora_b], dim=1)
    du = [dy @ b * scale for dy, b in zip(dys, lora_b, strict=True)]
    db = [(dy.t() @ u) * scale for dy, u in zip(dys, us, strict=True)]
    return torch.cat(du, dim=1) if len(du) > 1 else du[0], db


def _has_kernel(dtype: torch.dtype, lora_b: Sequence[Tensor]) -> bool:
    return dtype == torch.bfloat16 and max(b.shape[1] for b in lora_b) <= LARGEST_RANK


def is_worth_a_kernel(dys: Sequence[Tensor]) -> bool:
    """Whether the kernel is quicker on gradients of these sizes, strides and addresses."""
    numbers = ((dy.shape[1], dy.stride(0), dy.data_ptr()) for dy in dys)
    is_aligned = all(number % _STEP == 0 for each in numbers for number in each)
    is_hopper = torch.cuda.get_device_capability(dys[0].device)[0] == _HOPPER
    return is_aligned and is_hopper and dys[0].shape[0] >= LEAST_TOKENS


@torch.library.custom_op("tunefork::lora_gradients", mutates_args=(), device_types="cuda")
def _lora_gradients(
    dys: Sequence[Tensor], u: Tensor, lora_b: Sequence[Tensor], scale: float
) -> list[Tensor]:
    # Asked in here, where it is no question of torch.compile's: one form serves all lengths.
    if not is_worth_a_kernel(dys):
        du_sr, db = lora_gradients_reference(dys, u, lora_b, scale)
        return [du_sr, *db]
    from tunefork.kernels.lora_gradients_triton import launch  # needs Triton: it comes with CUDA

    return launch(dys, u, lora_b, scale)


@_lora_gradients.register_fake
def _(dys: Sequence[Tensor], u: Tensor, lora_b: Sequence[Tensor], scale: float) -> list[Tensor]:
    return [u.new_empty(u.shape), *(b.new_empty(b.shape) for b in lora_b)]
