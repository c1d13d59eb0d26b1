"""Directions of a layer's inputs that an FP8 product multiplies apart, or is mended along.

Inputs of a layer lie mostly along few directions (their mean, massive activations: Sun et al. 2024,
https://arxiv.org/abs/2402.17762). With V (D, m) an orthonormal basis of those, V^T x is taken out
of x before it is rounded, and multiplied with W V, as the delta's u is with B, in about bf16's
precision: neither x's rounding nor the weight's then loses anything of it. (A low-rank correction
weighted by the activations: Zhang et al. 2024, LQER, https://arxiv.org/abs/2402.02446.)

An NF4 base's forward weight is rounded to nearest, and its product is filled up to a multiple of 64
columns: in half of those, E V of n further directions, E = W - rounded W, stands beside the weight
and V^T x beside x, so that along V the product is W's own. (The other half had the low parts of x's
largest channels, where directions were not taken apart; it is empty.)

All is read through rows that are appended to A, so it costs no further pass over x. The input's
gradient has none of this: its rounding turns A's and B's gradients by a cosine of 0.999
(docs/fp8.md).

Shape legend as in `fp8.py`; m directions taken out of x, n further ones, C spare columns.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunefork.kernels.e4m3 import E4M3, num_directions

_MOST = 224.0
"""Of E V's codes, half of what e4m3 holds: V^T x is kept small in turn, as it has x's scale."""
_ITERATIONS = 6


@dataclass(frozen=True, slots=True)
class Correction:
    """What is put beside a widened weight, and what reads x for it."""

    apart_om: Tensor
    """(O, m) bf16: W V of the directions that are taken out of x, in units of the rows' scales."""
    columns_oc: Tensor
    """(O, C) e4m3."""
    probe_cd: Tensor
    """(m + C, D) bf16: V^T of those, V^T of the n, scaled, and zeros."""


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


@torch.no_grad()
def correction(
    x_sd: Tensor,
    weights: Iterable[Tensor],
    codes_od: Tensor | None,
    scale_o1: Tensor,
    spare: int,
    apart: int,
) -> Correction:
    """For `weights` (O_i, D), whose e4m3 form is `codes_od` * `scale_o1`, and inputs like x.

    `spare` is C, `apart` m; without spare columns there need be no codes.
    """
    device, size = x_sd.device, x_sd.shape[1]
    wanted = num_directions(spare)
    v_dn = main_directions(x_sd, apart + wanted)
    probe = torch.zeros(apart + spare, size, dtype=torch.bfloat16, device=device)
    probe[:apart] = v_dn[:, :apart].t()
    out_om, lost_on, start = [], [], 0
    for part in weights:
        own = part.to(device).float()
        rows = slice(start, start + len(part))
        # Of V as bf16 holds it: what is taken out of x along it is then given back whole.
        out_om.append((own @ probe[:apart].t().float() / scale_o1[rows]).bfloat16())
        if codes_od is not None:
            lost = own - codes_od[rows].float() * scale_o1[rows]
            lost_on.append(lost @ v_dn[:, apart:] / scale_o1[rows])
        start += len(part)
    columns = torch.zeros(start, spare, device=device)
    if codes_od is not None:
        beside = torch.cat(lost_on)
        largest_n = beside.abs().amax(0).clamp(min=1e-30)
        gain_n = torch.exp2(torch.floor(torch.log2(_MOST / largest_n)))
        columns[:, :wanted] = beside * gain_n
        probe[apart : apart + wanted] = (v_dn[:, apart:] / gain_n).t()
    return Correction(torch.cat(out_om), columns.to(E4M3), probe)
