"""What the optimiser keeps and moves, by `train.optim`'s rules; a test holds the two together.

LoRA, QLoRA        AdamW on fp32 parameters: two fp32 moments, and gradients all the time; an fp32
                   shadow of a bf16 module that is trained whole (lora.modules_to_save)
full, fp32         an fp32 shadow of each bf16 weight, two fp32 moments
full, bf16         two fp32 moments; the shadow exists while its weight is updated
adamw_bf16         two bf16 moments, and nothing else while a weight is updated (on a CPU a few
                   MB: it goes by pieces)
adamw_8bit         moments in 8 bits with an fp32 maximum for 256 of them; of a weight with fewer
                   than 4,096 elements in fp32 (bitsandbytes' `min_8bit_size`)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tunefork.recipe import FullSection, Method

_SMALLEST_8BIT = 4096
_BLOCK = 256
_OPERATIONS, _ROUNDED_OPERATIONS = 5, 10
"""Kernels that the update of one weight starts: widen, update, copy; and make a shadow, round."""


def state_bytes(parameters: Sequence[nn.Parameter], method: Method, full: FullSection) -> list[int]:
    """Bytes of each tensor that the optimiser keeps between steps."""
    sizes = []
    for parameter in parameters:
        numel = parameter.numel()
        if method is not Method.FULL:
            shadows = [] if parameter.dtype == torch.float32 else [4 * numel]
            sizes += [*shadows, 4 * numel, 4 * numel]
            continue
        if full.weights == "fp32" and parameter.dtype != torch.float32:
            sizes.append(4 * numel)
        if full.optimizer == "adamw_8bit" and numel >= _SMALLEST_8BIT:
            sizes += [numel, numel, 4 * -(-numel // _BLOCK), 4 * -(-numel // _BLOCK)]
        else:
            width = 2 if full.optimizer == "adamw_bf16" else 4
            sizes += [width * numel, width * numel]
    return sizes


def keeps_gradients(parameters: Sequence[nn.Parameter], method: Method) -> bool:
    """Whether gradients are there all the time (`LoraAdamW`), not from their pass to the update."""
    return method is not Method.FULL and all(p.dtype == torch.float32 for p in parameters)


@dataclass(frozen=True, slots=True)
class Update:
    """What one update takes beyond what is kept."""

    room_bytes: int
    """Taken while weights are updated, with every gradient still there."""
    moved_bytes: float
    """Read and written by clipping and the update."""
    num_operations: int
    """Started one after another; 0 where one fused call updates all."""
    eight_bit_params: int
    """Whose moments are kept in 8 bits."""
    rounded_params: int
    """That are rounded stochastically."""


def update(parameters: Sequence[nn.Parameter], method: Method, full: FullSection) -> Update:
    """Memory and traffic of an optimiser's `step`, clipping included."""
    total = sum(p.numel() for p in parameters)
    states = sum(state_bytes(parameters, method, full))
    width = parameters[0].element_size()
    # Clipping reads the gradients twice and writes them once; the update reads them, writes and
    # reads them widened, reads and writes every state and the weights.
    moved = 6.0 * sum(p.numel() * p.element_size() for p in parameters) + 2.0 * states
    if method is not Method.FULL:
        narrow = [p.numel() for p in parameters if p.dtype != torch.float32]
        num_operations = len(parameters) * _OPERATIONS if narrow else 0
        return Update(4 * max(narrow, default=0), moved, num_operations, 0, 0)
    if full.optimizer == "adamw_bf16":
        # The norm reads the gradients, the update reads them too; weights and moments go both ways.
        moved = 4.0 * sum(p.numel() * p.element_size() for p in parameters) + 2.0 * states
        return Update(0, moved, len(parameters), 0, 0)
    largest = max(p.numel() for p in parameters)
    is_rounded = full.weights == "bf16" and width < 4
    # An fp32 gradient of one weight, beside its bf16 one. Without shadows also its fp32 weight.
    room = 0 if width == 4 else 8 if is_rounded else 4
    return Update(
        room_bytes=room * largest,
        moved_bytes=moved,
        num_operations=len(parameters) * (_ROUNDED_OPERATIONS if is_rounded else _OPERATIONS),
        eight_bit_params=total if full.optimizer == "adamw_8bit" else 0,
        rounded_params=total if is_rounded else 0,
    )
