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

Both read x through rows that are appended to A, so they cost no further pass over it. Where a pass
more is affordable (an NF4 base), the first m directions are taken out of x altogether before it is
rounded, and multiplied apart, as the delta is: then their part is not lost in x's rounding either.
Channels are left alone there: what is large of them lies in those directions.

The input's gradient is not corrected: its rounding turns A's and B's gradients by a cosine of 0.998
(docs/performance.md).

Shape legend as in `fp8.py`; m directions taken out of x, n further ones, k channels, C = n + k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunefork.kernels.e4m3 import E4M3, LOW, num_directions

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
    """(m + C, D) bf16: V^T of those, V^T of the n, scaled, and a row with a single one for each
    channel."""


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


def main_channels(x_sd: Tensor, energy_d: Tensor, count: int) -> Tensor:
    """(k,): the inputs whose rounding weighs most; `energy_d` are their columns' sums of squares. k
    is `count`, or D if that is less."""
    share_sd = x_sd.float() / x_sd.float().norm(dim=1, keepdim=True).clamp(min=1e-30)
    weighed_d = energy_d * share_sd.square().sum(0)
    index_k: Tensor = weighed_d.topk(min(count, len(energy_d))).indices
    return index_k


@torch.no_grad()
def correction(
    x_sd: Tensor,
    weights: Sequence[Tensor],
    codes_od: Tensor,
    scale_o1: Tensor,
    spare: int,
    apart: int = 0,
) -> Correction:
    """For `weights` (O_i, D), whose e4m3 form is `codes_od` * `scale_o1`, and inputs like x.

    `spare` is C, `apart` m.
    """
    device, size = x_sd.device, x_sd.shape[1]
    wanted = num_directions(spare)
    v_dn = main_directions(x_sd, apart + wanted)
    probe = torch.zeros(apart + spare, size, dtype=torch.bfloat16, device=device)
    probe[:apart] = v_dn[:, :apart].t()
    out_om, lost_on, energy_d, start = [], [], torch.zeros(size, device=device), 0
    for part in weights:
        own = part.to(device).float()
        rows = slice(start, start + len(part))
        lost = own - codes_od[rows].float() * scale_o1[rows]
        # Of V as bf16 holds it: what is taken out of x along it is then given back whole.
        out_om.append(own @ probe[:apart].t().float() / scale_o1[rows])
        lost_on.append(lost @ v_dn[:, apart:] / scale_o1[rows])
        energy_d += own.square().sum(0)
        start += len(part)
    beside = torch.cat(lost_on)
    gain_n = torch.exp2(torch.floor(torch.log2(_MOST / beside.abs().amax(0).clamp(min=1e-30))))
    columns = torch.zeros(len(codes_od), spare, device=device)
    columns[:, :wanted] = beside * gain_n
    probe[apart : apart + wanted] = (v_dn[:, apart:] / gain_n).t()
    if not apart:
        index_k = main_channels(x_sd, energy_d, spare - wanted)
        count = len(index_k)
        columns[:, wanted : wanted + count] = codes_od.float()[:, index_k] / LOW
        probe[wanted + torch.arange(count, device=device), index_k] = 1.0
    return Correction(torch.cat(out_om).bfloat16(), columns.to(E4M3), probe)
