"""Which draws of its weights a step in FP8 takes (`kernels/e4m7.py`, `nf4_e4m3.py`).

Each group of layers has a seed on the device, made of its number and of the optimiser step's over
four, and a turn, the rest: of four steps every weight goes up in as many as the mean asks for. What
a draw moves in all of a step's tokens at once, which no number of them averages out, the next ones
move back; halves do in two steps, as turns that follow each other are two apart. So all
passes of a step draw the same: how it is cut into micro-batches, whose tokens share it, and whether
layers run again, compiled or captured, changes no rounding; and a step that is taken again, or that
another process goes on with, draws what it drew. Adapters that are trained together draw by the
steps of those that began first, whether these fail or not: one that joins later has other draws
than alone.
"""

import torch
from torch import nn

from tunefork.kernels.adamw import mix
from tunefork.model.fused import FusedLinear

_TURNS = (0, 2, 1, 3)


def draw_for(model: nn.Module, step: int) -> None:
    """Have the passes of optimiser step `step` draw theirs, without waiting for the device."""
    found = (m.group.seeds_g4 for m in model.modules() if isinstance(m, FusedLinear))
    if (seeds_g4 := next(found, None)) is not None:
        number = torch.arange(seeds_g4.numel(), dtype=torch.int32, device=seeds_g4.device)
        seeds_g4.copy_(mix(mix(number) + step // len(_TURNS)).view_as(seeds_g4))
        seeds_g4[:, 2] = _TURNS[step % len(_TURNS)]
