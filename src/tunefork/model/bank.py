"""The slots of a model's bank of deltas: filled, replaced, emptied, read out, told their tokens.

A rank sweep and many customers' adapters train in the slots of one pass, and a server reads them
token by token. A model gets its bank in `add_bank.py`, the layer is in `bank_linear.py`.

A slot can be filled, replaced and emptied without touching a bit of the others'. An empty slot is
zeros, which train to zeros: their gradients are.

Shape legend as in `bank_linear.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.data.slots import is_even
from tunefork.errors import AdapterError, ModelError
from tunefork.kernels.bank import Bounds, Padded, padded_rank, spans
from tunefork.kernels.bank_mixed import Mixed
from tunefork.kernels.bank_read import Tiles
from tunefork.kernels.bank_stretches import Layout
from tunefork.model.bank_linear import BankLinear, Routing
from tunefork.model.build import check_lora, lora_scale
from tunefork.model.linear import Nf4Linear, first_a
from tunefork.recipe import LoraSection

Deltas = Mapping[str, tuple[Tensor, Tensor, float]]
"""Path of a layer -> A (R, D), B (O, R), scale."""


@dataclass(frozen=True, slots=True)
class BankAdapter:
    """An adapter that is trained in a bank: what it would be alone."""

    lora: LoraSection
    seed: int


@dataclass(slots=True)
class Bank:
    """The slots of a model's `layers`, by path, in module order. After `fuse`, call `to`."""

    model: PreTrainedModel
    """With the bank on it."""
    skeleton: PreTrainedModel
    """The base as it was loaded, without values."""
    layers: dict[str, BankLinear]
    routing: Routing
    held: list[dict[str, int]] = field(default_factory=list)
    """Of each slot: the rank that its adapter has on each layer it has a delta on."""

    @property
    def num_slots(self) -> int:
        """G"""
        return len(self.held)

    @property
    def device(self) -> torch.device:
        """Where the slots lie."""
        return self.routing.ends_g.device

    @property
    def is_fused(self) -> bool:
        """Whether every layer's base is a group's, whose deltas are grouped products."""
        plain = (nn.Linear, Nf4Linear)
        return not any(isinstance(layer.base, plain) for layer in self.layers.values())

    def to(self, device: torch.device) -> None:
        """Follow the model to `device`; due after `fuse`, which moves it."""
        self.model.to(device)
        self.routing.ends_g = self.routing.ends_g.to(device)
        self.routing.rates_g = self.routing.rates_g.to(device)
        self._pad()

    def fits(self, slot: int, lora: LoraSection) -> bool:
        """Whether an adapter of these settings has room in `slot`."""
        paths = check_bank_lora(self.skeleton, lora)
        return all(p in self.layers and self.layers[p].ranks[slot] >= lora.rank for p in paths)

    def resize(self, loras: Sequence[LoraSection | None]) -> None:
        """Slots just as large as these need, all empty; None: none of its own.

        Raises ModelError for a target that no adapter of the bank was announced with.
        """
        held = [{} if x is None else dict.fromkeys(self._paths(x), x.rank) for x in loras]
        self.routing.scales[:] = [1.0] * len(held)
        self.routing.ends_g = torch.zeros(len(held), dtype=torch.int32, device=self.device)
        self.routing.rates_g = torch.zeros(len(held), device=self.device)
        for path, layer in self.layers.items():
            layer.resize([ranks.get(path, 0) for ranks in held])
        self.held = [{} for _ in held]
        self._pad()

    def start(self, slot: int, adapter: BankAdapter) -> None:
        """Fill `slot` with an untrained adapter, value for value what `model.build` makes alone."""
        generator = torch.Generator().manual_seed(adapter.seed)
        lora, found = adapter.lora, {}
        for path in self._paths(lora):
            layer = self.layers[path]
            a_rd = first_a(lora.rank, layer.in_features, generator)
            found[path] = (a_rd, torch.zeros(1, 1).expand(layer.out_features, lora.rank))
        self.put(slot, found, scale=lora_scale(lora), dropout=lora.dropout)

    @torch.no_grad()
    def put(
        self,
        slot: int,
        matrices: Mapping[str, tuple[Tensor, Tensor]],
        *,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        """Fill `slot` with A (R, D) and B (O, R) by path, to be trained on or read."""
        if dropout and not any(layer.dropout for layer in self.layers.values()):
            raise ModelError(
                "lora.dropout: this group was begun without dropout; an adapter with it needs a "
                "group that was begun with one"
            )
        self._write(slot, matrices, matrices.__getitem__)
        self.routing.scales[slot] = scale
        self.routing.rates_g[slot] = dropout
        # In place: a captured pass reads it where it lies.
        for ranks, kind in {la.ranks: la.kind for la in self.layers.values()}.items():
            self.routing.padded[kind].scale_q[slice(*spans(ranks)[slot])] = scale

    @torch.no_grad()
    def load(self, slot: int, found: Deltas) -> None:
        """Fill `slot` of a serving bank. Other slots may be read meanwhile.

        Values must be finite, times the scale too: they reach other adapters' tokens, as zero times
        a number. Raises AdapterError, before anything is changed, for what has no room here.
        """

        def scaled(path: str) -> tuple[Tensor, Tensor]:
            a_rd, b_or, scale = found[path]
            return (self._wide(path, a_rd) * scale).to(self.layers[path].dtype), b_or

        self._write(slot, {path: (a_rd, b_or) for path, (a_rd, b_or, _) in found.items()}, scaled)

    @torch.no_grad()
    def load_parts(self, slot: int, found: Deltas, parts: Iterable[Deltas]) -> None:
        """As `load`, of what has room here, with few calls: `parts` are `found`, of which each is
        on the bank's device until the next is asked for."""
        rooms, rest = {}, []
        for path, layer in self.layers.items():
            rank = found[path][0].shape[0] if path in found else 0
            assert layer.kept is None, "rows: `own` may be a copy; see `load`"
            own = layer.own(slot)
            rooms[path] = (own[0][:rank], own[1][:rank])
            if rank < layer.ranks[slot]:
                rest += [own[0][rank:], own[1][rank:]]
        if rest:
            torch._foreach_zero_(rest)
        for part in parts:
            wide = [self._wide(path, a_rd) for path, (a_rd, _, _) in part.items()]
            scaled = torch._foreach_mul(wide, [scale for _, _, scale in part.values()])
            torch._foreach_copy_([rooms[path][0] for path in part], scaled)
            up = [b_or.t() for _, b_or, _ in part.values()]
            torch._foreach_copy_([rooms[path][1] for path in part], up)
        self.held[slot] = {path: a_rd.shape[0] for path, (a_rd, _, _) in found.items()}

    def _wide(self, path: str, a_rd: Tensor) -> Tensor:
        """A in the dtype in which it is scaled, to be rounded once."""
        return a_rd.to(torch.promote_types(a_rd.dtype, self.layers[path].dtype))

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Empty `slot`."""
        for layer in self.layers.values():
            layer.write(slot, None, None)
        self.held[slot] = {}

    def adapter(self, slot: int) -> dict[str, tuple[Tensor, Tensor]]:
        """A (R, D) and B (O, R) of the adapter in `slot`, by path; views, where it is trained."""
        found = {}
        for path, rank in self.held[slot].items():
            a_rd, b_ro = self.layers[path].own(slot)
            found[path] = (a_rd.detach()[:rank], b_ro.detach()[:rank].t())
        return found

    def route_segments(self, bounds: Bounds, ends_g: Tensor | None = None) -> None:
        """Tokens lie in segments by slot, those of the next passes; `ends_g` on the device."""
        self.routing.bounds, self.routing.mode = bounds, "segments"
        self.routing.is_even = is_even(bounds)
        if ends_g is None:
            ends_g = torch.tensor([last for _, last in bounds], dtype=torch.int32)
        self.routing.ends_g.copy_(ends_g, non_blocking=True)

    def route_tokens(self, index_s: Tensor) -> None:
        """Each token's slot, or -1, is read from `index_s` (S,) whenever a pass runs."""
        self.routing.index_s, self.routing.mode = index_s, "tokens"

    def route_stretches(self, layout: Layout) -> None:
        """The next pass's tokens are whose the host says: of a bank that is only read."""
        self.routing.layout, self.routing.mode = layout, "stretches"

    def route_tiles(self, tiles: Tiles) -> None:
        """As `route_stretches`, on a GPU."""
        self.routing.tiles, self.routing.mode = tiles, "tiles"

    def route_mixed(self, mixed: Mixed) -> None:
        """The same of a pass of few tokens; it is read whenever the pass runs."""
        self.routing.mixed, self.routing.mode = mixed, "mixed"

    def route_none(self) -> None:
        """Every token sees the base alone."""
        self.routing.mode = "none"

    @contextmanager
    def only(self, slot: int) -> Iterator[None]:
        """Within, the model is its base with the adapter in `slot`."""
        before = self.routing.mode
        self.routing.mode, self.routing.slot = "one", slot
        try:
            yield
        finally:
            self.routing.mode = before

    def _paths(self, lora: LoraSection) -> list[str]:
        paths = check_bank_lora(self.skeleton, lora)
        if missing := [path for path in paths if path not in self.layers]:
            raise ModelError(
                f"lora.targets: {missing[0]} has no deltas in this group; start a group anew that "
                "is told of all its adapters' targets"
            )
        return paths

    @torch.no_grad()
    def _write(
        self,
        slot: int,
        found: Mapping[str, tuple[Tensor, Tensor]],
        ready: Callable[[str], tuple[Tensor, Tensor]],
    ) -> None:
        """`found` in `slot`, as `ready` has the matrices of a path."""
        for path, (a_rd, b_or) in found.items():
            layer = self.layers.get(path)
            if layer is None:
                raise AdapterError(f"{path}: no layer of this bank is called so")
            rank, room = a_rd.shape[0], layer.ranks[slot]
            wanted = ((rank, layer.in_features), (layer.out_features, rank))
            if rank > room or (tuple(a_rd.shape), tuple(b_or.shape)) != wanted:
                raise AdapterError(
                    f"{path}: A {tuple(a_rd.shape)} and B {tuple(b_or.shape)} do not fit slot "
                    f"{slot}, which has rank {room} and {wanted}"
                )
        for path, layer in self.layers.items():
            layer.write(slot, *(ready(path) if path in found else (None, None)))
        self.held[slot] = {path: a_rd.shape[0] for path, (a_rd, _) in found.items()}

    def _pad(self) -> None:
        rank = padded_rank([max(layer.ranks, default=0) for layer in self.layers.values()])
        kinds = list(dict.fromkeys(layer.ranks for layer in self.layers.values()))
        scales = self.routing.scales
        self.routing.padded[:] = [Padded.of(x, rank, scales, self.device) for x in kinds]
        for layer in self.layers.values():
            layer.kind = kinds.index(layer.ranks)


def check_bank_lora(model: PreTrainedModel, lora: LoraSection) -> list[str]:
    """Paths that `lora` adapts; raises ModelError for what a bank cannot share a pass with."""
    if lora.dora:
        raise ModelError(
            "lora.dora: DoRA scales whole rows of the base's product, which adapters in one pass "
            "share; train it alone (tunefork train)"
        )
    if lora.modules_to_save:
        raise ModelError(
            f"lora.modules_to_save: {lora.modules_to_save[0]} would be trained whole, and adapters "
            "in one pass share it; train this adapter alone (tunefork train)"
        )
    return check_lora(model, lora)


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """Its modules as they were loaded, without values: where later adapters' targets are found."""
    with torch.device("meta"):
        return type(model)(model.config)
