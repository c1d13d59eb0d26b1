"""The gradients' global norm, and the factor that brings it down to a limit.

The factor is not applied here: the update reads every gradient anyway, and a pass of its own over
an 8B model's would move 32 GB.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def global_norm(parameters: Iterable[nn.Parameter]) -> float:
    """L2 norm of all gradients together, summed in fp32; one wait for the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    if gradients[0].is_cuda:
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        return float(torch.linalg.vector_norm(torch.stack(norms)))
    # Row by row in the gradient's own dtype: on a CPU, PyTorch would copy a bf16 gradient to fp32
    # to take one norm in fp32 (35 ms against 1.5 ms for SmolLM2's embedding). Sums are fp32 inside;
    # the rows' rounding, 1/256 in bf16, averages out.
    rows = [torch.linalg.vector_norm(g, dim=-1).flatten().float() for g in gradients]
    return float(torch.linalg.vector_norm(torch.cat(rows)))


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply the gradients with so that their norm is at most `max_norm`."""
    return max_norm / norm if math.isfinite(norm) and norm > max_norm else 1.0
