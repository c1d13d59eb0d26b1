"""The banks of layers with one input that a CPU serves: kept as tables of rows.

In place of each layer's own matrices, those of all layers of a fused group (or of one layer by
itself) lie side by side, as `kernels/bank_stretches.py` reads them.

Shape legend as there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunefork.kernels.bank_stretches import add_stretches
from tunefork.kernels.bank_tables import Matrices
from tunefork.model.bank_linear import BankLinear


class OwnRows:
    """Of layers that are only read, with slots of one rank; every layer of the group has a bank."""

    def __init__(self, banks: Sequence[BankLinear], weight_od: Tensor) -> None:
        """`weight_od` of all layers, one below the other. Slots are empty from now on."""
        self.routing, self.weight = banks[0].routing, weight_od
        self.sizes = [bank.out_features for bank in banks]
        self.matrices = keep_rows(banks)

    def outputs(self, x_sd: Tensor) -> tuple[Tensor, ...]:
        """Each layer's y (S, O_i), its deltas added."""
        if self.routing.mode not in ("none", "stretches"):
            raise NotImplementedError(f"these banks are not read by {self.routing.mode}")
        y_so = x_sd @ self.weight.t()
        if self.routing.mode == "stretches":
            assert self.routing.layout is not None
            add_stretches(y_so, x_sd, self.matrices, self.routing.layout)
        return torch.split(y_so, self.sizes, dim=1)


def keep_rows(banks: Sequence[BankLinear]) -> Matrices:
    """Have layers with one input, and slots of one rank, keep A and B in rows. Slots are empty."""
    ranks, one = banks[0].ranks, banks[0]
    sizes, device = [bank.out_features for bank in banks], one.rows_a.device
    matrices = Matrices(len(ranks), ranks[0], one.in_features, sizes, one.dtype, device)
    for at, bank in enumerate(banks):
        bank.keep_in(matrices, at)
    return matrices
