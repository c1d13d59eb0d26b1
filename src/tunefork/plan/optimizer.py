"""What the optimiser keeps and moves, by `train.optim`'s rules; a test holds the two together.

LoRA, QLoRA        AdamW on fp32 parameters: two fp32 moments, and gradients all the time; an fp32
                   shadow of a bf16 module that is trained whole (lora.modules_to_save)
full, fp32         an fp32 shadow of each bf16 weight, two fp32 moments
full, bf16         two fp32 moments; the shadow exists while its weight is updated, on a CPU:
                   a GPU updates each bf16 weight at once and widens neither it nor its gradient
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
_AT_ONCE_OPERATIONS = 2
"""One kernel, and as much again of Python around it: 52 us a weight, where five operations take 146
and ten 229 (`h200_kernels.json`); with bf16 moments 33."""
_THROUGH_SHADOWS, _AT_ONCE, _AT_ONCE_KEPT = 6.0, 4.0, 3.0
"""Times that the weights' own bytes are moved beside the states, which go both ways. Clipping reads
the gradients twice and writes them once; the update reads them, writes and reads them widened, and
writes the weights. At once: the norm and the update each read the gradients, and weights go both
ways; those with a kept shadow are written only."""


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


def update(
    parameters: Sequence[nn.Parameter], method: Method, full: FullSection, device: str
) -> Update:
    """Memory and traffic of an optimiser's `step` on "cuda" or "cpu", clipping included."""
    states = 2.0 * sum(state_bytes(parameters, method, full))
    is_full = method is Method.FULL
    if is_full and full.optimizer == "adamw_bf16":
        return Update(0, _AT_ONCE * _num_bytes(parameters) + states, len(parameters), 0, 0)
    is_8bit = is_full and full.optimizer == "adamw_8bit"
    is_rounded = is_full and full.weights == "bf16"
    kernel_takes = torch.bfloat16 if device == "cuda" and not is_8bit else None
    at_once = [p for p in parameters if p.dtype == kernel_takes]
    others = [p for p in parameters if p.dtype != kernel_takes]
    narrow = [p.numel() for p in others if p.dtype != torch.float32]
    moved = _THROUGH_SHADOWS * _num_bytes(others) + states
    moved += (_AT_ONCE if is_rounded else _AT_ONCE_KEPT) * _num_bytes(at_once)
    per_weight = _ROUNDED_OPERATIONS if is_rounded and narrow else _OPERATIONS
    is_flat = keeps_gradients(parameters, method)
    return Update(
        # An fp32 gradient of one weight, beside its bf16 one. Without shadows also its fp32 weight.
        room_bytes=(8 if is_rounded else 4) * max(narrow, default=0),
        moved_bytes=moved,
        num_operations=0
        if is_flat
        else _AT_ONCE_OPERATIONS * len(at_once) + per_weight * len(others),
        eight_bit_params=sum(p.numel() for p in parameters) if is_8bit else 0,
        rounded_params=sum(narrow) if is_rounded else 0,
    )


def _num_bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
