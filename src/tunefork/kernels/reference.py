"""The definitions: every operation that has a hand-written backward, in plain PyTorch.

The fast versions (`lora.py`, `dora.py`, `cross_entropy.py`) have the same signatures and are tested
against these. Shape legend: S tokens, D features in, O features out, R rank, V vocabulary; a
leading `...` stands for any batch dimensions.
"""

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
