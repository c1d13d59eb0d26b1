"""Which draw of its NF4 weights the backward pass of a step in FP8 takes (`kernels/nf4_e4m3.py`).

Each group of layers has a seed on the device, made of its number and the optimiser step's. So all
passes of a step draw the same: how it is cut into micro-batches, who shares it, and whether layers
run again, compiled or captured, changes no rounding; and a step that is taken again, or that
another process goes on with, draws what it drew.
"""

import torch
from torch import Tensor, nn

from tunefork.kernels.adamw import mix

_WIDTH = 4
"""Numbers of a seed, of which the first is read: the compiler takes operands to be aligned."""


def new_seeds(count: int, device: torch.device) -> Tensor:
    """(count, 4) int32: a group's seed is a row."""
    return torch.zeros(count, _WIDTH, dtype=torch.int32, device=device)


def draw_for(model: nn.Module, step: int) -> None:
    """Have the passes of optimiser step `step` draw theirs, without waiting for the device."""
    found = (getattr(module, "group", None) for module in model.modules())
    seeds_g4: Tensor | None = next((group.seeds_g4 for group in found if group is not None), None)
    if seeds_g4 is not None:
        number = torch.arange(seeds_g4.numel(), dtype=torch.int32, device=seeds_g4.device)
        seeds_g4.copy_(mix(mix(number) + step).view_as(seeds_g4))
