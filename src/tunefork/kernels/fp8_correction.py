"""What rounding a frozen weight to e4m3 takes from its products, given back in columns to spare.

The forward product of `fp8.py` is widened for the delta, and filled up to a multiple of 64 columns:
what the filling costs is paid already. Two things go there.

- **Directions.** Inputs of a layer lie mostly along few directions (their mean, massive
  activations: Sun et al. 2024, https://arxiv.org/abs/2402.17762). With E = W - rounded W and V
  (D, n) an orthonormal basis of those, E V stands beside the weight and V^T x beside x, so that
  along V the product is W's own. (A low-rank correction weighted by the activations: Zhang et al.
  2024, LQER, https://arxiv.org/abs/2402.02446.)
- **Channels.** What x's own rounding takes from its few largest channels is put beside x as a low
  part, against a copy of their columns of the weight.

Both read x through rows that are appended to A, so they cost no further pass over it. Gradients are
not corrected: rounding there moves A's and B's gradients by 0.1 % (docs/performance.md).

Shape legend as in `fp8.py`; n directions, k channels, C = n + k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunefork.kernels.e4m3 import E4M3, LOW, num_directions

_MOST = 224.0
"""Of E V's codes, half of what e4m3 holds: V^T x is kept small in turn, as it has x's scale."""
_ITERATIONS = 6


@dataclass(frozen=True, slots=True)
class Correction:
    """What is put beside a widened weight, and what reads x for it."""

    columns_oc: Tensor
    """(O, C) e4m3."""
    probe_cd: Tensor
    """(C, D) bf16: V^T, scaled, then a row with a single one for each channel."""


def main_directions(x_sd: Tensor, count: int) -> Tensor:
    """(D, n) fp32, orthonormal: where most of the rows of x lie, each row counted alike.

    By orthogonal iteration; n is `count`, or D if that is less.
    """
    x_sd = x_sd.float()
    x_sd = x_sd / x_sd.norm(dim=1, keepdim=True).clamp(min=1e-30)
    generator = torch.Generator().manual_seed(0)
    size = x_sd.shape[1]
    start = torch.randn(size, min(count, size), generator=generator).to(x_sd.device)
    v_dn: Tensor = torch.linalg.qr(start).Q
    for _ in range(_ITERATIONS):
        v_dn = torch.linalg.qr(x_sd.t() @ (x_sd @ v_dn)).Q
    return v_dn


@torch.no_grad()
def correction(
    x_sd: Tensor,
    weights: Sequence[Tensor],
    codes_od: Tensor,
    scale_o1: Tensor,
    spare: int,
) -> Correction:
    """For `weights` (O_i, D), whose e4m3 form is `codes_od` * `scale_o1`, and inputs like x.

    The weights may lie in host memory; each is brought to x's device alone.
    """
    device, size = x_sd.device, x_sd.shape[1]
    wanted = num_directions(spare)
    v_dn = main_directions(x_sd, wanted)
    loss_on, energy_d, start = [], torch.zeros(size, device=device), 0
    for part in weights:
        own = part.to(device).float()
        rows = slice(start, start + len(part))
        lost = own - codes_od[rows].float() * scale_o1[rows]
        loss_on.append((lost @ v_dn) / scale_o1[rows])
        energy_d += own.square().sum(0)
        start += len(part)
    beside = torch.cat(loss_on)
    largest_n = beside.abs().amax(0).clamp(min=1e-30)
    gain_n = torch.exp2(torch.floor(torch.log2(_MOST / largest_n)))
    channels = min(spare - wanted, size)
    share_sd = x_sd.float() / x_sd.float().norm(dim=1, keepdim=True).clamp(min=1e-30)
    index_k = (energy_d * share_sd.square().sum(0)).topk(channels).indices
    columns = torch.zeros(len(codes_od), spare, device=device)
    probe = torch.zeros(spare, size, dtype=torch.bfloat16, device=device)
    found = v_dn.shape[1]
    columns[:, :found] = beside * gain_n
    probe[:found] = (v_dn / gain_n).t()
    columns[:, wanted : wanted + channels] = codes_od.float()[:, index_k] / LOW
    probe[wanted + torch.arange(channels, device=device), index_k] = 1.0
    return Correction(columns.to(E4M3), probe)
