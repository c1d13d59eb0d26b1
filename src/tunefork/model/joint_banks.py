"""The banks of a fused group that is served: A of all slots stands below the base's weight.

Where few tokens decode over many adapters, the number of kernels is the larger part of the time,
and a product of its own for A is as many kernels as the base has. So all slots' A of all layers of
the group lie in one tensor with the base's bf16 weight, [W; A] (O + L N R, D), and one product
gives y and u. 33 slots of rank 16 are a tenth of an 8B model's weights, which are read anyway for
as many tokens. A weight that is kept in FP8 has a product of another kind, and A one of its own.

What is then left of a decoding pass is each row's own u times its own B, one kernel for all layers
of the group; with a prompt's few tokens among them, two (`kernels/bank_mixed.py`). The tokens of a
longer one are multiplied by their own A as well (`kernels/bank_read.py`).

Shape legend as there; L layers of the group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunefork.kernels.bank_mixed import add_mixed
from tunefork.kernels.bank_read import Tiles, add_own, down, up
from tunefork.model.bank_linear import BankLinear


class JointBanks:
    """Of layers that are only read, with slots of one rank; every layer of the group has a bank."""

    def __init__(self, banks: Sequence[BankLinear], weight_od: Tensor | None) -> None:
        """`weight_od` of all layers, one below the other; None: it is multiplied apart."""
        self.routing, self.rank = banks[0].routing, banks[0].ranks[0]
        self.sizes = [bank.out_features for bank in banks]
        rows = [bank.rows_a.detach() for bank in banks]
        self.rows = torch.cat(rows if weight_od is None else [weight_od, *rows])
        self.features_out = 0 if weight_od is None else weight_od.shape[0]
        at = self.features_out
        for bank in banks:
            bank.rows_a.data = self.rows[at : at + bank.rows_a.shape[0]]
            at += bank.rows_a.shape[0]
        self.b = torch.cat([bank.rows_b.detach().flatten() for bank in banks])
        parts = torch.split(self.b, [bank.rows_b.numel() for bank in banks])
        for bank, part in zip(banks, parts, strict=True):
            bank.rows_b.data = part.view_as(bank.rows_b)

    @property
    def weight(self) -> Tensor:
        """The base's part, (O, D)."""
        return self.rows[: self.features_out]

    def outputs(self, x_sd: Tensor, ys: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        """Each layer's y (S, O_i), its deltas added. `ys`: of the base, where it was multiplied
        apart; they may be changed in place."""
        match self.routing.mode:
            case "none":
                return self._split(x_sd @ self.weight.t()) if ys is None else tuple(ys)
            case "tokens" | "mixed":
                return self._of_all_slots(x_sd, ys)
            case "tiles":
                return self._of_tiles(x_sd, ys)
            case mode:
                raise NotImplementedError(f"these banks are not read by {mode}")

    def _of_all_slots(self, x_sd: Tensor, ys: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        both_sk = x_sd @ self.rows.t()
        y_so, u_sk = both_sk[:, : self.features_out], both_sk[:, self.features_out :]
        if ys is None:
            self._add(y_so, u_sk, self.b, self.sizes)
            return self._split(y_so)
        for y, u, b in zip(ys, u_sk.chunk(len(self.sizes), dim=1), self._bs(), strict=True):
            self._add(y, u, b, [y.shape[1]])
        return tuple(ys)

    def _add(self, y_so: Tensor, u_sk: Tensor, b: Tensor, sizes: Sequence[int]) -> None:
        """Each token's own B times its own u, of all slots', in place."""
        slot_s, mixed = self.routing.index_s, self.routing.mixed
        if self.routing.mode == "mixed":
            assert mixed is not None
            add_mixed(y_so, u_sk, mixed, b, sizes, self.rank)
        else:
            assert slot_s is not None
            add_own(y_so, u_sk, slot_s, b, sizes, self.rank)

    def _of_tiles(self, x_sd: Tensor, ys: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        tiles = self.routing.tiles
        assert tiles is not None
        u_sk = down(x_sd, self.rows[self.features_out :], tiles, len(self.sizes), self.rank)
        if ys is None:
            return self._split(self._of_tiles_with_weight(x_sd, u_sk, tiles))
        us = u_sk.chunk(len(self.sizes), dim=1)
        for y, u, b in zip(ys, us, self._bs(), strict=True):
            up(y, u, b, tiles, [y.shape[1]], self.rank)
        return tuple(ys)

    def _of_tiles_with_weight(self, x_sd: Tensor, u_sk: Tensor, tiles: Tiles) -> Tensor:
        # Where K is long, a product that adds is slower than one that does not, by more than
        # reading y takes (H200: 8 %); else it is as quick. A compiler would copy y before it.
        if torch.compiler.is_compiling() or x_sd.shape[1] > self.features_out:
            y_so = x_sd @ self.weight.t()
            up(y_so, u_sk, self.b, tiles, self.sizes, self.rank)
            return y_so
        y_so = x_sd.new_empty(x_sd.shape[0], self.features_out)
        up(y_so, u_sk, self.b, tiles, self.sizes, self.rank, begins=True)
        return y_so.addmm_(x_sd, self.weight.t())

    def _bs(self) -> tuple[Tensor, ...]:
        """Each layer's part of B."""
        one = self.b.numel() // sum(self.sizes)
        return torch.split(self.b, [one * size for size in self.sizes])

    def _split(self, y_so: Tensor) -> tuple[Tensor, ...]:
        return torch.split(y_so, self.sizes, dim=1)
