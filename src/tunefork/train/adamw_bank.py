"""AdamW over the slots of a bank: all in one flat tensor, each slot its own optimiser.

Nothing here waits for a GPU. A slot whose loss or gradient is not finite, or whose loss has left no
gradient (`guard.lost_gradient`), is left as it was before the step, and in every later one, on the
device itself: the host learns of it when it reads the figures, a step later, and by then nothing
has happened to the slot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd, inf

import torch
from torch import Tensor, nn

from tunefork.kernels.adamw import factors_of
from tunefork.kernels.adamw_slots import FACTORS, adamw_slots_, slot_norms, update_slot_
from tunefork.kernels.bank import spans
from tunefork.model.bank import Bank
from tunefork.train.clip import clip_factor
from tunefork.train.flat import FlatParameters
from tunefork.train.guard import LEAST_LOSS

_BLOCK = 1024
"""Most elements of a block. The fewer, the more there are to number, 8 bytes and more each. A power
of two, so that a parameter of whole blocks, or any aligned as `FlatParameters` does, begins one."""


@dataclass(frozen=True, slots=True)
class SlotUpdate:
    """What one slot's AdamW does at one step."""

    count: int
    """Updates, this one included."""
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float | None


class BankAdamW:
    """AdamW of every slot of `bank`; made anew when the bank was resized."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.layers = {path: la for path, la in bank.layers.items() if sum(la.ranks)}
        leaves = [rows for layer in self.layers.values() for rows in (layer.rows_a, layer.rows_b)]
        self.flat = FlatParameters(leaves)
        self.m = torch.zeros_like(self.flat.gradient)
        self.v = torch.zeros_like(self.flat.gradient)
        widths = [leaf.shape[1] for leaf in leaves]
        self.block = gcd(_BLOCK, *widths)
        device = self.m.device
        self.slot_b = self._slot_of_blocks(leaves).to(device)
        self.at_gk = _blocks_of(self.slot_b.cpu(), bank.num_slots).to(device)
        self._views: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
        self.is_alive_g = torch.ones(bank.num_slots, dtype=torch.bool, device=device)

    def _slot_of_blocks(self, leaves: Sequence[nn.Parameter]) -> Tensor:
        """(b,) int32; blocks between two parameters are slot G's."""
        slots = torch.full((len(self.m) // self.block,), self.bank.num_slots, dtype=torch.int32)
        ranks = [layer.ranks for layer in self.layers.values() for _ in (0, 1)]
        for leaf, span, own in zip(leaves, self.flat.spans, ranks, strict=True):
            width = leaf.shape[1]
            for slot, (start, end) in enumerate(spans(own)):
                first, last = (span.start + row * width for row in (start, end))
                slots[first // self.block : last // self.block] = slot
        return slots

    def step(self, updates: Mapping[int, SlotUpdate], loss_g: Tensor) -> Tensor:
        """Update the slots of `updates`, each by its gradient, clipped by its own norm.

        `loss_g` (G,) are the step's losses. Returns the norms before clipping, (G,), without
        waiting for a GPU. All gradients are zero afterwards.
        """
        self.flat.attach_gradients()
        g_bn = self.flat.gradient.view(-1, self.block)
        norm_g = slot_norms(g_bn, self.at_gk)
        is_lost_g = (norm_g == 0.0) & (loss_g > LEAST_LOSS)
        is_fine_g = norm_g.isfinite() & loss_g.isfinite() & ~is_lost_g
        if g_bn.is_cuda:
            self._step_all(updates, norm_g, is_fine_g)
        else:
            self._step_each(updates, norm_g, is_fine_g)
        return norm_g

    def _step_all(
        self, updates: Mapping[int, SlotUpdate], norm_g: Tensor, is_fine_g: Tensor
    ) -> None:
        """All slots in one kernel."""
        factors, limits = self._factors(updates)
        self.is_alive_g &= is_fine_g | (factors[:-1, -1] == 0)
        factors[:-1, 2] = torch.where(norm_g > limits, limits / norm_g, 1.0)
        factors[:-1, -1] *= self.is_alive_g
        flat = (self.flat.values.detach(), self.flat.gradient, self.m, self.v)
        p_bn, g_bn, m_bn, v_bn = (x.view(-1, self.block) for x in flat)
        adamw_slots_(p_bn, g_bn, m_bn, v_bn, self.slot_b, factors)

    def _step_each(
        self, updates: Mapping[int, SlotUpdate], norm_g: Tensor, is_fine_g: Tensor
    ) -> None:
        """One slot after the other, on a CPU."""
        for slot, update in updates.items():
            self.is_alive_g[slot] &= is_fine_g[slot]
            if bool(self.is_alive_g[slot]):
                update_slot_(
                    self._parts(slot),
                    torch.tensor(float(update.count)),
                    learning_rate=update.learning_rate,
                    betas=update.betas,
                    weight_decay=update.weight_decay,
                    gradient_scale=clip_factor(float(norm_g[slot]), update.max_grad_norm),
                )
        self.flat.gradient.zero_()

    def _parts(self, slot: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """p, g, m and v of each of a slot's matrices, as views."""
        if slot not in self._views:
            every = [
                self.flat.views(flat)
                for flat in (self.flat.values.detach(), self.flat.gradient, self.m, self.v)
            ]
            ranks = [layer.ranks for layer in self.layers.values() for _ in (0, 1)]
            own = [slice(*spans(of)[slot]) for of in ranks]
            parts = zip(own, *every, strict=True)
            self._views[slot] = [
                (p[at], g[at], m[at], v[at]) for at, p, g, m, v in parts if at.stop > at.start
            ]
        return self._views[slot]

    def _factors(self, updates: Mapping[int, SlotUpdate]) -> tuple[Tensor, Tensor]:
        """(G + 1, FACTORS) and the norms' limits (G,), on a GPU; the host does not wait."""
        rows = [[1.0, *[0.0] * (FACTORS - 1)] for _ in range(self.bank.num_slots + 1)]
        limits = [1.0] * self.bank.num_slots
        for slot, update in updates.items():
            known = factors_of(
                update.count,
                learning_rate=update.learning_rate,
                betas=update.betas,
                weight_decay=update.weight_decay,
                gradient_scale=1.0,
            )
            rows[slot] = [*known, 1.0]
            limits[slot] = inf if update.max_grad_norm is None else update.max_grad_norm
        device, both = self.m.device, (torch.tensor(rows), torch.tensor(limits))
        factors, limits_g = (x.pin_memory().to(device, non_blocking=True) for x in both)
        return factors, limits_g

    def moments(self, slot: int) -> dict[str, tuple[Tensor, Tensor]]:
        """`PATH.lora_a` and `PATH.lora_b` -> first and second moments as views, B's transposed."""
        found = {}
        pairs = zip(self.flat.views(self.m), self.flat.views(self.v), strict=True)
        for path, layer in self.layers.items():
            (ma, va), (mb, vb) = next(pairs), next(pairs)
            rank = self.bank.held[slot].get(path, 0)
            if rank:
                start = spans(layer.ranks)[slot][0]
                own = slice(start, start + rank)
                found[f"{path}.lora_a"] = (ma[own], va[own])
                found[f"{path}.lora_b"] = (mb[own].t(), vb[own].t())
        return found

    @torch.no_grad()
    def forget(self, slot: int) -> None:
        """Drop what is known of `slot`, gradient included, as before its first step."""
        is_own_b = (self.slot_b == slot)[:, None]
        for flat in (self.m, self.v, self.flat.gradient):
            flat.view(-1, self.block).masked_fill_(is_own_b, 0.0)
        self.is_alive_g[slot] = True


def _blocks_of(slot_b: Tensor, slots: int) -> Tensor:
    """(G, K) int32: the blocks of each slot, filled up by b."""
    own = [(slot_b == slot).nonzero(as_tuple=True)[0] for slot in range(slots)]
    table = torch.full((slots, max(map(len, own))), len(slot_b), dtype=torch.int32)
    for slot, blocks in enumerate(own):
        table[slot, : len(blocks)] = blocks
    return table
