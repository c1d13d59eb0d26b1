"""Many LoRA adapters over one base, in a compiled pass: each token reads its own B, and no other.

`bank_tokens.masked` multiplies all slots' B, for a product of its own is the quickest that PyTorch
has. Within a compiled layer a product is a kernel more, and this is elementwise: the sum over a
rank of few terms becomes part of the kernel that reads y next (silu, residual and norm), and B is
read once for each token, mostly from the cache where tokens share an adapter. Counted for an 8B
shape (64 tokens, 32 slots of rank 16): 45 MB of B a layer, as `masked`, but without its 11 kernels.

Shape legend as in `bank_tokens.py`; L layers with one input.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MOST_TERMS = 32
"""Ranks up to which the sum is written out term by term, so that the compiler sees no reduction."""


def add_own(
    ys: Sequence[Tensor], u_slnr: Tensor, slot_s: Tensor, bs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Each y (S, O_i) with B_n u_n added, n each token's slot; -1: none. `bs` are (N, R, O_i).

    u (S, L, N, R) is of all slots. Summed in fp32, rounded once.
    """
    at_s, token_s = slot_s.clamp_min(0).long(), torch.arange(slot_s.shape[0], device=slot_s.device)
    has_one_s1 = (slot_s >= 0)[:, None]
    found = []
    for layer, (y_so, b_nro) in enumerate(zip(ys, bs, strict=True)):
        delta_so = _own(u_slnr[:, layer][token_s, at_s].float(), b_nro, at_s)
        found.append((y_so.float() + torch.where(has_one_s1, delta_so, 0)).to(y_so.dtype))
    return tuple(found)


def _own(u_sr: Tensor, b_nro: Tensor, at_s: Tensor) -> Tensor:
    rank = u_sr.shape[1]
    if rank > _MOST_TERMS:
        return (u_sr[:, :, None] * b_nro[at_s].float()).sum(1)
    delta_so = u_sr[:, :1] * b_nro[:, 0][at_s].float()
    for at in range(1, rank):
        delta_so = delta_so + u_sr[:, at : at + 1] * b_nro[:, at][at_s].float()
    return delta_so
