"""Many LoRA adapters over one base, read only: each token names its own adapter, -1 none.

What a server needs. The index is a tensor that is read where it lies, so that a captured CUDA graph
serves any mix of adapters. Four ways, by how many tokens there are:

    fewer than slots, on a GPU   each token's own A and B copied out, two batched products
    few, on a GPU                u of all adapters, what is not a token's own put to zero, all B:
                                 two products that read each adapter once (decoding)
    many, on a GPU               tokens sorted by adapter on the device, grouped products (prefill)
    on a CPU                     a loop over the adapters that are there

u of other adapters is replaced by zeros, not multiplied; B must be finite, which `model.bank`
checks as an adapter enters.

Shape legend: S tokens, D features in, O features out, N slots, R rank (padded with zeros).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_FEW = 256
"""Tokens up to which all adapters are multiplied: a tensor core's work is the reading of B."""

_COPIED = 3
"""What a token's own matrices cost, copied and read, in units of reading a slot's in place."""


def bank_tokens(x_sd: Tensor, slot_s: Tensor, a_nrd: Tensor, b_nro: Tensor) -> Tensor:
    """B_n A_n x with n each token's slot: (S, O), zero for -1. A carries the adapter's scale."""
    if not x_sd.is_cuda:
        return _by_slot(x_sd, slot_s, a_nrd, b_nro)
    if x_sd.shape[0] * _COPIED <= a_nrd.shape[0]:
        return gathered(x_sd, slot_s, a_nrd, b_nro)
    if x_sd.shape[0] <= _FEW:
        return masked(x_sd, slot_s, a_nrd, b_nro)
    return sorted_by_slot(x_sd, slot_s, a_nrd, b_nro)


def gathered(x_sd: Tensor, slot_s: Tensor, a_nrd: Tensor, b_nro: Tensor) -> Tensor:
    """Each token's own two products."""
    own_s = slot_s.clamp_min(0)
    u_s1r = x_sd[:, None] @ a_nrd[own_s].transpose(1, 2)
    delta_so = (u_s1r @ b_nro[own_s])[:, 0]
    return torch.where((slot_s >= 0)[:, None], delta_so, 0)


def masked(x_sd: Tensor, slot_s: Tensor, a_nrd: Tensor, b_nro: Tensor) -> Tensor:
    """All slots' products, each token's own kept."""
    slots, rank, _ = a_nrd.shape
    u_snr = (x_sd @ a_nrd.flatten(0, 1).t()).view(-1, slots, rank)
    is_own_sn = slot_s[:, None] == torch.arange(slots, device=slot_s.device)
    own_snr = torch.where(is_own_sn[:, :, None], u_snr, 0)
    return own_snr.flatten(1) @ b_nro.flatten(0, 1)


def is_own(slot_s: Tensor, slots: int) -> Tensor:
    """(S, N) whether a slot is a token's own; the same for all layers of a pass."""
    return slot_s[:, None] == torch.arange(slots, device=slot_s.device)


def add_masked(
    ys: Sequence[Tensor], u_slnr: Tensor, is_own_sn: Tensor, bs: Sequence[Tensor]
) -> None:
    """`masked` for L layers with one input, added to their ys (S, O_i) in place.

    u (S, L, N, R) is of all slots. One masking, one product up each; `bs` are (N, R, O_i).
    """
    own_slnr = torch.where(is_own_sn[:, None, :, None], u_slnr, 0)
    for at, (y_so, b_nro) in enumerate(zip(ys, bs, strict=True)):
        y_so.addmm_(own_slnr[:, at].flatten(1), b_nro.flatten(0, 1))


def sorted_by_slot(x_sd: Tensor, slot_s: Tensor, a_nrd: Tensor, b_nro: Tensor) -> Tensor:
    """Grouped products, tokens in the order of their slots. bf16; D and O multiples of 8."""
    slots = a_nrd.shape[0]
    key_s = torch.where(slot_s < 0, slots, slot_s).to(torch.int32)  # those without one come last
    key_s, order_s = torch.sort(key_s, stable=True)
    numbers_n = torch.arange(slots, device=slot_s.device, dtype=torch.int32)
    ends_n = torch.searchsorted(key_s, numbers_n, right=True, out_int32=True)
    u_sr = torch._grouped_mm(x_sd[order_s], a_nrd.transpose(1, 2), offs=ends_n)
    delta_so = torch._grouped_mm(u_sr, b_nro, offs=ends_n)
    # Behind the last end nothing was written.
    delta_so = torch.where((key_s < slots)[:, None], delta_so, 0)
    return torch.empty_like(delta_so).index_copy_(0, order_s, delta_so)


def _by_slot(x_sd: Tensor, slot_s: Tensor, a_nrd: Tensor, b_nro: Tensor) -> Tensor:
    delta_so = x_sd.new_zeros(x_sd.shape[0], b_nro.shape[2])
    for slot in sorted(set(slot_s.tolist())):
        if slot >= 0:
            [mine] = (slot_s == slot).nonzero(as_tuple=True)
            delta_so[mine] = (x_sd[mine] @ a_nrd[slot].t()) @ b_nro[slot]
    return delta_so
