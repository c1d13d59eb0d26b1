"""Banks that are only read, at odd sizes, and what each token is to get of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tunefork.kernels import reference
from tunefork.kernels.bank_read import add_own


class Read(NamedTuple):
    """Layers with one input over random matrices; all as `kernels/bank_read.py` has them."""

    x_sd: Tensor
    y_so: Tensor
    """A view: its rows do not follow each other."""
    a_kd: Tensor
    b: Tensor
    sizes: Sequence[int]
    rank: int

    def u_sk(self) -> Tensor:
        """Of all slots."""
        return self.x_sd @ self.a_kd.t()

    def added(self, slot_s: Tensor) -> Tensor:
        """What `add_own` makes of y, which stays."""
        out = self.y_so.shape[1]
        y_so = torch.nn.functional.pad(self.y_so, (0, 16))[:, :out]
        add_own(y_so, self.u_sk(), slot_s, self.b, self.sizes, self.rank)
        return y_so

    def expected(self, slot_s: Tensor) -> Tensor:
        """y (S, O) by the definition, in fp32."""
        slots = self.b.numel() // (self.rank * sum(self.sizes))
        a_lnrd = self.a_kd.float().view(len(self.sizes), slots, self.rank, -1)
        flats = torch.split(self.b.float(), [slots * self.rank * size for size in self.sizes])
        found = []
        for a_nrd, flat, size in zip(a_lnrd, flats, self.sizes, strict=True):
            b_nor = flat.view(slots, self.rank, size).transpose(1, 2)
            zero = torch.zeros(size, self.x_sd.shape[1], device=self.x_sd.device)
            found.append(
                reference.bank_linear(
                    self.x_sd.float(), zero, None, slot_s, [*a_nrd], [*b_nor], [1.0] * slots
                )
            )
        return self.y_so.float() + torch.cat(found, dim=1)


def draw(
    tokens: int,
    slots: int,
    rank: int,
    features: int,
    sizes: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Read:
    """Values for which x, u and the deltas are of size one."""
    torch.manual_seed(0)
    layers, out = len(sizes), sum(sizes)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    return Read(
        randn(tokens, features).to(dtype),
        randn(tokens, out + 16).to(dtype)[:, :out],
        (randn(layers * slots * rank, features) / features**0.5).to(dtype),
        (randn(slots * rank * out) / rank**0.5).to(dtype),
        sizes,
        rank,
    )
