"""Directions of a layer's inputs that an int8 product multiplies apart.

Inputs of a layer lie mostly along few directions (their mean, massive activations: Sun et al. 2024,
https://arxiv.org/abs/2402.17762). With V (D, m) an orthonormal basis of those, V^T x is taken out
of x before it is rounded, and multiplied with W V, as the delta's u is with B, in bf16: then
neither x's rounding nor the weight's loses anything of it, and what is left of x has no outliers,
which would take a row's scale for themselves. (A low-rank correction
weighted by the activations: Zhang et al. 2024, LQER, https://arxiv.org/abs/2402.02446.) V^T x is
read through rows that are appended to A, so that costs no further pass over x.

The input's gradient has none of this: dy's main directions are not x's, and what its rounding
costs is another error in each step, which averages out.

Shape legend as in `int8.py`; m directions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ITERATIONS = 6


def main_directions(x_sd: Tensor, count: int) -> Tensor:
    """(D, `count`) fp32, orthonormal, the main one first: where most of the rows of x lie, each row
    counted alike. Zeros from D on.

    By orthogonal iteration.
    """
    x_sd = x_sd.float()
    x_sd = x_sd / x_sd.norm(dim=1, keepdim=True).clamp(min=1e-30)
    size, generator = x_sd.shape[1], torch.Generator().manual_seed(0)
    start = torch.randn(size, min(count, size), generator=generator).to(x_sd.device)
    v_dn: Tensor = torch.linalg.qr(start).Q
    for _ in range(_ITERATIONS):
        v_dn = torch.linalg.qr(x_sd.t() @ (x_sd @ v_dn)).Q
    padded: Tensor = F.pad(v_dn, (0, count - v_dn.shape[1]))
    return padded


def along(weight_od: Tensor, probe_md: Tensor) -> Tensor:
    """W V (O, m) bf16, for V^T (m, D) bf16.

    Of V as bf16 holds it: what is taken out of x along it is then given back whole.
    """
    return (weight_od.float() @ probe_md.t().float()).bfloat16()
