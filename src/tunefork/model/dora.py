"""DoRA: a low-rank delta whose rows' lengths are trained apart from their directions.

Liu et al. 2024, https://arxiv.org/abs/2402.09353. A layer of its own beside `LoraLinear`, so that
plain LoRA's forward pass has no branch for it.

Shape legend as in `linear.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunefork.kernels.dora import dora_linear, row_norms, row_squares
from tunefork.model.linear import LoraLinear, Nf4Linear


class DoraLinear(nn.Module):
    """y = m / ||W + s B A|| * (W + s B A) x + bias: W frozen; A, B and m (O,) trained in fp32.

    m starts as the rows' lengths: the untrained layer equals its base. The rows' squared lengths in
    the base are kept beside it, 4 bytes each, because W never changes.
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
        lora = LoraLinear(base, rank=rank, scale=scale, dropout=dropout, generator=generator)
        self.base, self.scale, self.dropout = base, scale, dropout
        self.lora_a, self.lora_b = lora.lora_a, lora.lora_b
        squares_o = row_squares(self.materialize().detach())
        self.register_buffer("squares", squares_o, persistent=False)
        self.squares: Tensor
        self.magnitude = nn.Parameter(squares_o.sqrt())

    def materialize(self) -> Tensor:
        """The base's weight, (O, D), without the delta."""
        return self.base.weight if isinstance(self.base, nn.Linear) else self.base.materialize()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """m / ||W + s B A|| * (W + s B A) in fp32: (O, D)."""
        v_od = self.materialize().float().addmm(self.lora_b, self.lora_a, alpha=self.scale)
        return v_od.mul_((self.magnitude / v_od.norm(dim=1))[:, None])

    def forward(self, x_d: Tensor) -> Tensor:
        """(..., D) -> (..., O) in x_d's dtype."""
        if self.dropout > 0.0 and self.training:
            return self._dropped(x_d)
        return dora_linear(
            x_d,
            self.materialize,
            self.base.bias,
            self.lora_a,
            self.lora_b,
            self.magnitude,
            self.scale,
            self.squares,
        )

    def _dropped(self, x_d: Tensor) -> Tensor:
        """W x + bias + (g - 1) W x' + g s B A x' with x' = dropout(x), as the PEFT library has it.

        The change of direction and length sees dropout, the base does not.
        """
        norm_o = row_norms(self.materialize(), self.lora_a, self.lora_b, self.scale, self.squares)
        gain_o = (self.magnitude / norm_o).to(x_d.dtype)
        dropped_d = F.dropout(x_d, self.dropout)
        plain: Tensor = self.base(dropped_d)
        if self.base.bias is not None:
            plain = plain - self.base.bias
        delta = F.linear(F.linear(dropped_d, self.lora_a.to(x_d.dtype)), self.lora_b.to(x_d.dtype))
        base: Tensor = self.base(x_d)
        return base + (gain_o - 1) * plain + gain_o * self.scale * delta

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"rank={self.lora_a.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"


Delta = LoraLinear | DoraLinear
"""A linear layer with a low-rank delta."""
