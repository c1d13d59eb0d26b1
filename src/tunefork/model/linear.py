"""The one linear layer: a frozen base weight and a low-rank delta over it.

Full fine-tuning is a plain `nn.Linear` with no delta; LoRA is `LoraLinear` over an `nn.Linear`;
QLoRA is `LoraLinear` over an `Nf4Linear`. Many adapters at once are a `BankLinear` over either
(`bank_linear.py`). A base only has to hand out its weight when asked (`materialize`), so the layer
and its kernel do not know how it is stored.

Shape legend: D features in, O features out, R rank.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunefork.kernels.lora import frozen_linear, lora_linear
from tunefork.kernels.quantized import dequantize_nf4, quantize_nf4


class FrozenBase(Protocol):
    """What a delta lies over, where it is no plain linear layer."""

    bias: nn.Parameter | None
    in_features: int
    out_features: int

    def materialize(self) -> Tensor:
        """The weight, (O, D)."""

    def __call__(self, x_d: Tensor) -> Tensor:
        """(..., D) -> (..., O)"""


class Nf4Linear(nn.Module):
    """A frozen linear layer in 4-bit NormalFloat with double quantisation (QLoRA, section 3).

    The (O, D) weight takes about 4.13 bits a parameter and is dequantised, to the dtype it came
    in, whenever it is used. It is quantised on `device` (default: `linear`'s) and stays there.
    """

    def __init__(self, linear: nn.Linear, device: torch.device | None = None) -> None:
        super().__init__()
        codes, self.state = quantize_nf4(linear.weight.detach().to(device))
        self.register_buffer("codes", codes)
        self.codes: Tensor
        self.bias: nn.Parameter | None = (
            linear.bias if linear.bias is None else nn.Parameter(linear.bias.to(device))
        )
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def materialize(self) -> Tensor:
        """The weight, (O, D), in the dtype it was quantised from."""
        return dequantize_nf4(self.codes, self.state)

    def forward(self, x_d: Tensor) -> Tensor:
        """(..., D) -> (..., O), differentiable in x_d only."""
        return frozen_linear(x_d, self.materialize, self.bias)


def first_a(rank: int, features_in: int, generator: torch.Generator | None) -> Tensor:
    """What A (R, D) starts as, fp32. Drawn on the CPU: a seed gives the same on every device."""
    bound = 1 / math.sqrt(features_in)
    return torch.empty(rank, features_in).uniform_(-bound, bound, generator=generator)


class LoraLinear(nn.Module):
    """y = W x + bias + scale * B A dropout(x): W frozen, A (R, D) and B (O, R) trained in fp32.

    A starts as Kaiming-uniform(sqrt 5), that is U(-1/sqrt(D), 1/sqrt(D)), and B as zero, as in the
    PEFT library: the untrained layer equals its base.
    """

    def __init__(
        self,
        base: nn.Linear | Nf4Linear,
        *,
        rank: int,
        scale: float,
        dropout: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base: nn.Linear | FrozenBase = base
        self.scale, self.dropout = scale, dropout
        self.base_adds_delta = False
        """The base is a layer of a fused group (`model/fused.py`), which computes the delta too."""
        device = base.codes.device if isinstance(base, Nf4Linear) else base.weight.device
        lora_a = (
            torch.empty(rank, base.in_features, device=device)
            if device.type == "meta"
            else first_a(rank, base.in_features, generator).to(device)
        )
        self.lora_a = nn.Parameter(lora_a)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def materialize(self) -> Tensor:
        """The base's weight, (O, D), without the delta."""
        return self.base.weight if isinstance(self.base, nn.Linear) else self.base.materialize()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scale * B A in fp32: (O, D)."""
        return self.materialize().float().addmm(self.lora_b, self.lora_a, alpha=self.scale)

    def forward(self, x_d: Tensor) -> Tensor:
        """(..., D) -> (..., O) in x_d's dtype."""
        if self.base_adds_delta:
            return self.base(x_d)
        in_group = not isinstance(self.base, nn.Linear | Nf4Linear)
        if self.dropout > 0.0 and (self.training or in_group):
            # The delta's input differs from the base's, so the two products share nothing.
            dropped_d = F.dropout(x_d, self.dropout, self.training)
            delta = F.linear(
                F.linear(dropped_d, self.lora_a.to(x_d.dtype)), self.lora_b.to(x_d.dtype)
            )
            return self.base(x_d) + self.scale * delta
        return lora_linear(
            x_d, self.materialize, self.base.bias, self.lora_a, self.lora_b, self.scale
        )

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"rank={self.lora_a.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"
