"""Many LoRA adapters over one base, read only: each token names its own adapter, -1 none.

The index is a tensor that is read where it lies, so that a captured CUDA graph serves any mix of
adapters. For one layer by itself; those of a fused group are in `model/joint_banks.py`. On a GPU in
bf16: u of all slots, one product, then each token's own B (`bank_read.py`). The definition, which
runs elsewhere, is a loop over the adapters that are there.

Shape legend: S tokens, D features in, O features out, N slots, R rank (padded with zeros).
"""

import torch
from torch import Tensor

from tunefork.kernels.bank_read import add_own


def bank_tokens(x_sd: Tensor, slot_s: Tensor, a_nrd: Tensor, b_nro: Tensor) -> Tensor:
    """B_n A_n x with n each token's slot: (S, O), zero for -1. A carries the adapter's scale."""
    if not x_sd.is_cuda or x_sd.dtype != torch.bfloat16:
        return _by_slot(x_sd, slot_s, a_nrd, b_nro)
    u_sk = x_sd @ a_nrd.flatten(0, 1).t()
    delta_so = x_sd.new_zeros(x_sd.shape[0], b_nro.shape[2])
    add_own(delta_so, u_sk, slot_s, b_nro.flatten(), [b_nro.shape[2]], a_nrd.shape[1])
    return delta_so


def _by_slot(x_sd: Tensor, slot_s: Tensor, a_nrd: Tensor, b_nro: Tensor) -> Tensor:
    delta_so = x_sd.new_zeros(x_sd.shape[0], b_nro.shape[2])
    for slot in sorted(set(slot_s.tolist())):
        if slot >= 0:
            [mine] = (slot_s == slot).nonzero(as_tuple=True)
            delta_so[mine] = (x_sd[mine] @ a_nrd[slot].t()) @ b_nro[slot]
    return delta_so
