"""A linear layer with many deltas: each token is told which is its own.

`LoraLinear` is a base and one delta; `BankLinear` is the same base and N of them, in slots. The
base is whatever it is for one delta: an `nn.Linear`, an `Nf4Linear`, or a layer of a fused group
(`fused.py`), which then adds the bank's deltas to its one product. What belongs to all layers
(which tokens are whose) is one `Routing` that they share; `bank.py` fills the slots.

Shape legend: S tokens, D features in, O features out, G slots, Q rows of all slots, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunefork.kernels.bank import Bounds, Padded, add_segments, grouped, spans
from tunefork.kernels.bank_mixed import Mixed, add_mixed
from tunefork.kernels.bank_read import Tiles, down, up
from tunefork.kernels.bank_stretches import Layout, add_stretches
from tunefork.kernels.bank_tables import Matrices
from tunefork.kernels.bank_tokens import bank_tokens
from tunefork.model.linear import FrozenBase, Nf4Linear


@dataclass
class Routing:
    """Which tokens are whose, for all layers of a bank."""

    ends_g: Tensor
    """(G,) int32 on the device: before which token each slot ends. It stays where it is."""
    scales: list[float]
    """Of each slot."""
    rates_g: Tensor
    """(G,) fp32 on the device: each slot's dropout."""
    padded: list[Padded] = field(default_factory=list)
    """How rows lie in the grouped product, of each kind of layer: those of the same ranks."""
    mode: Literal["none", "segments", "one", "tokens", "stretches", "tiles", "mixed"] = "none"
    bounds: Bounds = ()
    """`ends_g` as the host knows it, with each slot's start; mode "segments"."""
    is_even: bool = False
    """All slots have as many tokens; mode "segments"."""
    slot: int = 0
    """Whose every token is; mode "one"."""
    index_s: Tensor | None = None
    """(S,) each token's slot, -1 for none; mode "tokens"."""
    layout: Layout | None = None
    """What the host knows of a pass that is only read from; mode "stretches"."""
    tiles: Tiles | None = None
    """The same for a GPU; mode "tiles"."""
    mixed: Mixed | None = None
    """The same of few tokens; mode "mixed"."""


class BankLinear(nn.Module):
    """y = W x + bias + scale_g * B_g A_g dropout_g(x) with g each token's slot: W frozen.

    Slot g has `ranks[g]` rows of `rows_a` (Q, D) and of `rows_b` (Q, O), its B transposed.
    """

    def __init__(
        self,
        base: nn.Linear | Nf4Linear,
        ranks: Sequence[int],
        routing: Routing,
        *,
        dtype: torch.dtype = torch.float32,
        dropout: float = 0.0,
        is_trained: bool = True,
    ) -> None:
        super().__init__()
        self.base: nn.Linear | FrozenBase = base
        self.routing, self.dtype = routing, dtype
        self.dropout = dropout
        """The most of any slot; 0: none ever draws, and the deltas' input is the base's."""
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base_adds_delta = False
        """The base is a layer of a fused group, which computes the deltas too."""
        self.is_trained = is_trained
        self.resize(ranks)

    def resize(self, ranks: Sequence[int]) -> None:
        """Room for slots of these ranks, all empty."""
        self.ranks, device = tuple(ranks), self.routing.ends_g.device
        rows = sum(ranks)
        self.rows_a = nn.Parameter(
            torch.zeros(rows, self.in_features, dtype=self.dtype, device=device), self.is_trained
        )
        self.rows_b = nn.Parameter(
            torch.zeros(rows, self.out_features, dtype=self.dtype, device=device), self.is_trained
        )
        self.kept: tuple[Matrices, int] | None = None
        """Where a CPU keeps A and B of a layer that is only read, and which of them it is."""
        self.kind = 0
        """Which of `routing.padded` says how its rows lie in the grouped product."""

    def own(self, slot: int) -> tuple[Tensor, Tensor]:
        """Views of a slot's A (R, D) and B transposed (R, O), in the graph of their rows; copies
        where they are kept elsewhere."""
        if self.kept is not None:
            matrices, at = self.kept
            return matrices.read(at, slot)
        start, end = spans(self.ranks)[slot]
        return self.rows_a[start:end], self.rows_b[start:end]

    def keep_in(self, matrices: Matrices, at: int) -> None:
        """From now on A and B are layer `at` of `matrices`, which are empty."""
        self.kept = (matrices, at)
        self.rows_a.data, self.rows_b.data = self.rows_a[:0].clone(), self.rows_b[:0].clone()

    @torch.no_grad()
    def write(self, slot: int, a_rd: Tensor | None, b_or: Tensor | None) -> None:
        """Fill a slot with A and B of its rank or less; None: empty it. Other slots may be read."""
        b_ro = None if b_or is None else b_or.t()
        if self.kept is not None:
            matrices, at = self.kept
            matrices.write(at, slot, a_rd, b_ro)
            return
        for own, given in zip(self.own(slot), (a_rd, b_ro), strict=True):
            rank = 0 if given is None else given.shape[0]
            if given is not None:
                own[:rank].copy_(given)
            if rank < own.shape[0]:
                own[rank:].zero_()

    @property
    def stacks(self) -> tuple[Tensor, Tensor]:
        """A (G, R, D) and B transposed (G, R, O) of slots that have one rank."""
        assert self.kept is None, "A and B are not here, but in the tables of `keep_in`"
        slots = len(self.ranks)
        return (
            self.rows_a.view(slots, -1, self.in_features),
            self.rows_b.view(slots, -1, self.out_features),
        )

    def materialize(self) -> Tensor:
        """The base's weight, (O, D), without deltas."""
        return self.base.weight if isinstance(self.base, nn.Linear) else self.base.materialize()

    def forward(self, x_d: Tensor) -> Tensor:
        """(..., D) -> (..., O) in x_d's dtype."""
        if self.base_adds_delta:
            return self.base(x_d)
        y_o: Tensor = self.base(x_d)
        routing = self.routing
        if routing.mode == "none" or not sum(self.ranks):
            return y_o
        y_so, x_sd = y_o.view(-1, y_o.shape[-1]), x_d.reshape(-1, x_d.shape[-1])
        if routing.mode in ("stretches", "tiles", "mixed"):
            self._add_read(y_so, x_sd)
            return y_o
        x_sd = self.dropped(x_sd)
        if routing.mode == "segments" and isinstance(self.base, nn.Linear | Nf4Linear):
            scales = tuple(routing.scales)
            y_so = add_segments(
                y_so, x_sd, self.rows_a, self.rows_b, self.ranks, routing.bounds, scales
            )
        else:
            y_so = y_so + deltas([self], x_sd)[0]
        return y_so.view(y_o.shape)

    def _add_read(self, y_so: Tensor, x_sd: Tensor) -> None:
        """Add the deltas of a pass that is only read from, in place."""
        routing, rank, sizes = self.routing, self.ranks[0], [self.out_features]
        match routing.mode:
            case "tiles":
                assert routing.tiles is not None
                u_sr = down(x_sd, self.rows_a, routing.tiles, 1, rank)
                up(y_so, u_sr, self.rows_b.flatten(), routing.tiles, sizes, rank)
            case "mixed":
                assert routing.mixed is not None
                u_sk = x_sd @ self.rows_a.t()
                add_mixed(y_so, u_sk, routing.mixed, self.rows_b.flatten(), sizes, rank)
            case _:
                assert routing.layout is not None and self.kept is not None
                add_stretches(y_so, x_sd, self.kept[0], routing.layout)

    def dropped(self, x_sd: Tensor) -> Tensor:
        """x with each slot's dropout, while training; drawn for all tokens at once."""
        routing = self.routing
        if not (self.dropout and self.training and routing.mode in ("segments", "one")):
            return x_sd
        if routing.mode == "one":
            rate_s1 = routing.rates_g[routing.slot]
        else:
            at_s = torch.arange(x_sd.shape[0], device=x_sd.device)
            slot_s = torch.bucketize(at_s, routing.ends_g, right=True)
            rate_s1 = routing.rates_g[slot_s.clamp_max(len(routing.rates_g) - 1)][:, None]
        is_kept = torch.rand_like(x_sd, dtype=torch.float32) >= rate_s1
        return torch.where(is_kept, x_sd / (1 - rate_s1).to(x_sd.dtype), 0)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"ranks={self.ranks}"


def deltas(layers: Sequence[BankLinear], x_sd: Tensor) -> tuple[Tensor, ...]:
    """What the bank adds to each of several layers with the input x (S, D): (S, O_i)."""
    routing = layers[0].routing
    match routing.mode:
        case "segments":
            rows_a, rows_b = [la.rows_a for la in layers], [la.rows_b for la in layers]
            kinds = [layer.kind for layer in layers]
            ends_g, is_even = routing.ends_g, routing.is_even
            return grouped(x_sd, ends_g, rows_a, rows_b, kinds, routing.padded, is_even)
        case "one":
            return tuple(_delta_of_one(layer, x_sd) for layer in layers)
        case "tokens":
            assert routing.index_s is not None
            return tuple(bank_tokens(x_sd, routing.index_s, *layer.stacks) for layer in layers)
        case "stretches" | "tiles" | "mixed":
            raise NotImplementedError("these are added in place")
        case "none":
            return tuple(x_sd.new_zeros(x_sd.shape[0], la.out_features) for la in layers)


def _delta_of_one(layer: BankLinear, x_sd: Tensor) -> Tensor:
    a_rd, b_ro = layer.own(layer.routing.slot)
    u_sr = F.linear(x_sd, a_rd.to(x_sd.dtype))
    return layer.routing.scales[layer.routing.slot] * (u_sr @ b_ro.to(x_sd.dtype))
