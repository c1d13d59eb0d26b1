"""A model is given a bank of deltas: slots to be trained together, or empty ones to be served from.

What is done with the slots is in `bank.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tunefork.model.bank import Bank, BankAdapter, check_bank_lora, skeleton_of
from tunefork.model.bank_linear import BankLinear, Routing
from tunefork.model.build import linear_paths, replace
from tunefork.model.linear import Nf4Linear
from tunefork.recipe import LoraSection


def _routing(model: PreTrainedModel, slots: int) -> Routing:
    device: Any = next(model.parameters()).device
    return Routing(
        torch.zeros(slots, dtype=torch.int32, device=device),
        [1.0] * slots,
        torch.zeros(slots, device=device),
    )


def add_bank(
    model: PreTrainedModel,
    adapters: Sequence[BankAdapter],
    *,
    announced: Sequence[LoraSection] = (),
) -> Bank:
    """Freeze `model` and give it a slot for each of `adapters`, untrained; in place.

    `announced` are settings of adapters that may take a slot later: the layers they target get room
    for deltas too. Raises ModelError as `check_bank_lora` does.
    """
    loras = [adapter.lora for adapter in adapters]
    targets = [set(check_bank_lora(model, lora)) for lora in (*loras, *announced)]
    dropout = max(lora.dropout for lora in (*loras, *announced))
    model.requires_grad_(False)
    routing, layers = _routing(model, len(adapters)), {}
    for path in linear_paths(model):
        if any(path in own for own in targets):
            ranks = [x.rank if path in own else 0 for x, own in zip(loras, targets, strict=False)]
            base = model.get_submodule(path)
            assert isinstance(base, nn.Linear | Nf4Linear)
            layers[path] = BankLinear(base, ranks, routing, dropout=dropout)
    for path, layer in layers.items():
        replace(model, path, layer)
    bank = Bank(model, skeleton_of(model), layers, routing, [{} for _ in adapters])
    bank.to(routing.ends_g.device)
    for slot, adapter in enumerate(adapters):
        bank.start(slot, adapter)
    return bank


def add_serving_bank(model: PreTrainedModel, *, slots: int, rank: int) -> Bank:
    """Give linear layers of `model` (not the head) empty slots of `rank`, to be read; in place."""
    model.requires_grad_(False)
    routing, layers = _routing(model, slots), {}
    for path in linear_paths(model):
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear | Nf4Linear)
        layers[path] = BankLinear(
            base,
            [rank] * slots,
            routing,
            dtype=model.dtype,
            is_trained=False,
        )
    for path, layer in layers.items():
        replace(model, path, layer)
    bank = Bank(model, skeleton_of(model), layers, routing, [{} for _ in range(slots)])
    bank.to(routing.ends_g.device)
    return bank
