"""The definitions: every operation that has a hand-written backward, in plain PyTorch.

The fast versions (`lora.py`, `dora.py`, `cross_entropy.py`) have the same signatures and are tested
against these, and so are `bank.py` and `bank_tokens.py`, which hold a bank's matrices as their
hardware wants them. Shape legend: S tokens, D features in, O features out, R rank, V vocabulary; a
leading `...` stands for any batch dimensions.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    x_d: Tensor,
    weight_od: Tensor,
    bias_o: Tensor | None,
    lora_a_rd: Tensor,
    lora_b_or: Tensor,
    scale: float,
) -> Tensor:
    """y = W x + bias + scale * B A x (Hu et al. 2021, eq. 3).

    x_d (..., D) and the result (..., O) have the weight's dtype; A and B may be wider and are
    rounded to it. Raises nothing; shapes that do not fit fail in PyTorch.
    """
    delta = F.linear(F.linear(x_d, lora_a_rd.to(x_d.dtype)), lora_b_or.to(x_d.dtype))
    return F.linear(x_d, weight_od, bias_o) + scale * delta


def bank_linear(
    x_sd: Tensor,
    weight_od: Tensor,
    bias_o: Tensor | None,
    slot_s: Tensor,
    lora_a: Sequence[Tensor | None],
    lora_b: Sequence[Tensor | None],
    scales: Sequence[float],
) -> Tensor:
    """y_s = W x_s + bias + scale_g * B_g A_g x_s with g the slot of token s: many in one pass.

    `slot_s` (S,) names each token's adapter, -1 none. A_g (R_g, D) and B_g (O, R_g) are None where
    adapter g has no delta on this layer. A token's result hangs on no other adapter's values: what
    is not finite stays with the tokens of the adapter that holds it, and so do gradients.
    """
    y_so = F.linear(x_sd, weight_od, bias_o)
    for slot, (a_rd, b_or, scale) in enumerate(zip(lora_a, lora_b, scales, strict=True)):
        if a_rd is not None and b_or is not None:
            [mine] = (slot_s == slot).nonzero(as_tuple=True)
            u = F.linear(x_sd[mine], a_rd.to(x_sd.dtype))
            y_so = y_so.index_add(0, mine, F.linear(u, b_or.to(x_sd.dtype)), alpha=scale)
    return y_so


def dora_linear(
    x_d: Tensor,
    weight_od: Tensor,
    bias_o: Tensor | None,
    lora_a_rd: Tensor,
    lora_b_or: Tensor,
    magnitude_o: Tensor,
    scale: float,
) -> Tensor:
    """y = m / ||V|| * V x + bias with V = W + scale * B A, norms by row (Liu et al. 2024, eq. 5).

    The norm is a constant to the gradient (section 4.3). Shapes and dtypes as for `lora_linear`.
    """
    v_od = weight_od + scale * (lora_b_or @ lora_a_rd).to(weight_od.dtype)
    gain_o = magnitude_o.to(v_od.dtype) / v_od.norm(dim=1).detach()
    y: Tensor = gain_o * F.linear(x_d, v_od)
    return y if bias_o is None else y + bias_o


def linear_cross_entropy(hidden_sd: Tensor, weight_vd: Tensor, targets_s: Tensor) -> Tensor:
    """-log softmax(W h)[target] for each token: (S,), fp32, from logits rounded to h's dtype."""
    return F.cross_entropy(F.linear(hidden_sd, weight_vd).float(), targets_s, reduction="none")
