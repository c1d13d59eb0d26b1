"""The products over segments that `bank.py` is made of: each token by its slot's matrix, and sums.

On a GPU all slots' products are one CUTLASS kernel (`torch._grouped_mm`). It reads by TMA, from
addresses that are multiples of 16 bytes, and a slot begins at any token: so a token's values must
lie side by side. Where instead tokens do, a slot that begins at no multiple of 8 of them ends the
process (an assert on the device, aten/src/ATen/native/cuda/GroupMMCommon.cuh).

So their layout is not left to a compiler. For `aten._grouped_mm(x.t(), y)` PyTorch 2.11's Inductor
writes x^T as a tensor of its own, tokens side by side, where nothing else has asked for x: on an
H200 the gradient of a model's first q, k and v did. These are operators that nothing is fused into,
and that see to it themselves.

Shape legend as in `bank.py`; K features that are summed over, N that are left.
"""

import torch
from torch import Tensor


def each(x_sk: Tensor, w_gkn: Tensor, ends_g: Tensor, is_even: bool) -> Tensor:
    """Each token's x times its slot's w: (S, N). `is_even`: slots have as many tokens each."""
    if is_even:
        slots, features, _ = w_gkn.shape
        return torch.bmm(x_sk.reshape(slots, -1, features), w_gkn).flatten(0, 1)
    found: Tensor = _each(x_sk, w_gkn, ends_g)
    return found


def sums(x_sk: Tensor, y_sn: Tensor, ends_g: Tensor, is_even: bool) -> Tensor:
    """x^T y over each slot's tokens: (G, K, N)."""
    if is_even:
        x_gsk, y_gsn = (t.reshape(len(ends_g), -1, t.shape[1]) for t in (x_sk, y_sn))
        return torch.bmm(x_gsk.transpose(1, 2), y_gsn)
    found: Tensor = _sums(x_sk, y_sn, ends_g)
    return found


@torch.library.custom_op("tunefork::each_by_slot", mutates_args=())
def _each(x_sk: Tensor, w_gkn: Tensor, ends_g: Tensor) -> Tensor:
    return torch._grouped_mm(_by_token(x_sk), w_gkn, offs=ends_g)


@_each.register_fake
def _(x_sk: Tensor, w_gkn: Tensor, ends_g: Tensor) -> Tensor:
    return x_sk.new_empty(x_sk.shape[0], w_gkn.shape[2])


@torch.library.custom_op("tunefork::sums_by_slot", mutates_args=())
def _sums(x_sk: Tensor, y_sn: Tensor, ends_g: Tensor) -> Tensor:
    return torch._grouped_mm(_by_token(x_sk).t(), _by_token(y_sn), offs=ends_g)


@_sums.register_fake
def _(x_sk: Tensor, y_sn: Tensor, ends_g: Tensor) -> Tensor:
    return x_sk.new_empty(ends_g.shape[0], x_sk.shape[1], y_sn.shape[1])


def _by_token(x_sk: Tensor) -> Tensor:
    """The same with each token's values side by side."""
    return x_sk if x_sk.stride(1) == 1 else x_sk.contiguous()
