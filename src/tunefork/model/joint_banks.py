"""The banks of a fused group that is served: A of all slots stands below the base's weight.

Where few tokens decode over many adapters, the number of kernels is the larger part of the time,
and a product of its own for A is as many kernels as the base has. So all slots' A of all layers of
the group lie in one tensor with the base's bf16 weight, [W; A] (O + L N R, D), and one product
gives y and u. 33 slots of rank 16 are a tenth of an 8B model's weights, which are read anyway for
as many tokens. A weight that is kept in FP8 has a product of another kind, and A one of its own.

What is then left of a decoding pass is u's own part times B, in one of two ways:

    masked   u of other slots put to zero, all B, one product a layer: every kernel is PyTorch's
    own      elementwise (`kernels/bank_own.py`): for layers that are compiled

Shape legend as in `kernels/bank_tokens.py`; L layers of the group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunefork.kernels.bank_own import add_own
from tunefork.kernels.bank_tokens import add_masked
from tunefork.model.bank_linear import BankLinear


class JointBanks:
    """Of layers that are only read, with slots of one rank; every layer of the group has a bank."""

    def __init__(
        self, banks: Sequence[BankLinear], weight_od: Tensor | None, *, reads_own: bool
    ) -> None:
        """`weight_od` of all layers, one below the other; None: it is multiplied apart."""
        self.banks, self.reads_own = list(banks), reads_own
        rows = [bank.rows_a.detach() for bank in banks]
        self.rows = torch.cat(rows if weight_od is None else [weight_od, *rows])
        self.features_out = 0 if weight_od is None else weight_od.shape[0]
        at = self.features_out
        for bank in banks:
            bank.rows_a.data = self.rows[at : at + bank.rows_a.shape[0]]
            at += bank.rows_a.shape[0]

    @property
    def weight(self) -> Tensor:
        """The base's part, (O, D)."""
        return self.rows[: self.features_out]

    def outputs(self, x_sd: Tensor, ys: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        """Each layer's y (S, O_i), its deltas added. `ys`: of the base, where it was multiplied
        apart; they may be changed in place."""
        routing = self.banks[0].routing
        if routing.mode != "tokens":
            ys = self._split(x_sd @ self.weight.t()) if ys is None else ys
            if routing.mode == "stretches":
                for bank, y_so in zip(self.banks, ys, strict=True):
                    bank.add_read(y_so, x_sd)
            return tuple(ys)
        both_sk = x_sd @ self.rows.t()
        ys = self._split(both_sk[:, : self.features_out]) if ys is None else ys
        slots = len(self.banks[0].ranks)
        u_slnr = both_sk[:, self.features_out :].view(x_sd.shape[0], len(self.banks), slots, -1)
        bs = [bank.stacks[1] for bank in self.banks]
        if self.reads_own:
            assert routing.index_s is not None
            return add_own(ys, u_slnr, routing.index_s, bs)
        assert routing.is_own_sn is not None
        add_masked(ys, u_slnr, routing.is_own_sn, bs)
        return tuple(ys)

    def _split(self, y_so: Tensor) -> tuple[Tensor, ...]:
        return torch.split(y_so, [bank.out_features for bank in self.banks], dim=1)
