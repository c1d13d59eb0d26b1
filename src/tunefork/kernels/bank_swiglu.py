"""SwiGLU over gate and up of a bank that is only read, for few tokens, with each row's own deltas.

`bank_read.add_own` and the activation behind it in one kernel (`bank_swiglu_triton.py`): gate and
up are written once, by the base's product, and only what they become is written again.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202. Shape legend as in `bank_read.py`; F
features of gate, and of up.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tunefork.kernels.bank_read import add_own_reference
from tunefork.kernels.compiled import is_on_gpu


def swiglu_own(y_so: Tensor, u_sk: Tensor, slot_s: Tensor, b: Tensor, rank: int) -> Tensor:
    """silu(gate) * up (S, F) of y = [gate | up], each row's B_n u_n added before; -1: none.

    As `bank_read.add_own` of two layers; y stays, or does not.
    """
    if is_on_gpu(y_so) and y_so.dtype == torch.bfloat16:
        return torch.ops.tunefork.bank_swiglu_own(  # type: ignore[no-any-return]
            y_so, u_sk, slot_s, b, rank
        )
    return swiglu_own_reference(y_so, u_sk, slot_s, b, rank)


def swiglu_own_reference(
    y_so: Tensor, u_sk: Tensor, slot_s: Tensor, b: Tensor, rank: int
) -> Tensor:
    """The definition of `swiglu_own`."""
    sizes = [y_so.shape[1] // 2] * 2
    add_own_reference(y_so, u_sk, slot_s, b, sizes, rank)
    gate_sf, up_sf = torch.split(y_so, sizes, dim=1)
    return F.silu(gate_sf) * up_sf


@torch.library.custom_op("tunefork::bank_swiglu_own", mutates_args=(), device_types="cuda")
def _swiglu_own(y: Tensor, u: Tensor, slots: Tensor, b: Tensor, rank: int) -> Tensor:
    from tunefork.kernels.bank_swiglu_triton import swiglu_own  # needs Triton

    return swiglu_own(y, u, slots, b, rank)


@_swiglu_own.register_fake
def _(y: Tensor, u: Tensor, slots: Tensor, b: Tensor, rank: int) -> Tensor:
    return y.new_empty(y.shape[0], y.shape[1] // 2)
