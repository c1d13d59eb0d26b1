"""Which draws of its weights a step in FP8 takes (`kernels/e4m5.py`, `nf4_e4m3.py`).

Each group of layers has a seed on the device, made of its number and the optimiser step's. So all
passes of a step draw the same: how it is cut into micro-batches, whose tokens share it, and whether
layers run again, compiled or captured, changes no rounding; and a step that is taken again, or that
another process goes on with, draws what it drew. Adapters that are trained together draw by the
steps of those that began first, whether these fail or not: one that joins later has other draws
than alone.

Over ten bits (`e4m5.py`) four steps share a seed, and each has another turn: what a draw moves in
all of a step's tokens at once, which no number of them averages out, the next steps move back; of
half a step in each two, as their turns are two apart.
"""

import torch
from torch import nn

from tunefork.kernels.adamw import mix
from tunefork.model.fused import FusedLinear

_TURNS = (0, 2, 1, 3)


def draw_for(model: nn.Module, step: int) -> None:
    """Have the passes of optimiser step `step` draw theirs, without waiting for the device."""
    groups = (m.group for m in model.modules() if isinstance(m, FusedLinear))
    group = next((group for group in groups if group.seeds_g4 is not None), None)
    if group is None:
        return
    assert group.seeds_g4 is not None
    seeds_g4, turn = group.seeds_g4, 0
    if group.layout.storage == "e4m5":
        step, at = divmod(step - 1, len(_TURNS))  # a run's first step is 1
        turn = _TURNS[at]
    number = torch.arange(seeds_g4.numel(), dtype=torch.int32, device=seeds_g4.device)
    seeds_g4.copy_(mix(mix(number) + step).view_as(seeds_g4))
    seeds_g4[:, 2] = turn
