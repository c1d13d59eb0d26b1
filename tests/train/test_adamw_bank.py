"""Which part of the flat tensor is whose: blocks of one slot, however wide the layers are."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tunefork.model.bank_linear import BankLinear, Routing
from tunefork.train.adamw_bank import BankAdamW


@pytest.mark.parametrize(
    ("sizes", "block"), [((64, 96), 32), ((256, 512), 256), ((1024, 2048), 1024)]
)
def test_each_block_is_one_slots(sizes: tuple[int, int], block: int) -> None:
    routing = Routing(torch.zeros(3, dtype=torch.int32), [1.0] * 3, torch.zeros(3))
    wide, narrow = sizes
    bases = {"up": nn.Linear(narrow, wide), "down": nn.Linear(wide, narrow)}
    ranks = {"up": (1, 3, 2), "down": (3, 0, 1)}
    layers = {path: BankLinear(base, ranks[path], routing) for path, base in bases.items()}
    bank: Any = SimpleNamespace(layers=layers, num_slots=3, held=[{"up": 1}, {}, {}])
    optimizer = BankAdamW(bank)
    assert optimizer.block == block
    with torch.no_grad():
        for layer in layers.values():
            for slot in range(3):
                for rows in layer.own(slot):
                    rows.fill_(slot + 1)
    values_bn = optimizer.flat.values.detach().view(-1, block)
    assert bool((values_bn == values_bn[:, :1]).all())  # 0: padding between parameters
    slot_of_b = torch.where(values_bn[:, 0] == 0, 3, values_bn[:, 0] - 1)
    assert torch.equal(optimizer.slot_b, slot_of_b.int())
    for slot, blocks in enumerate(optimizer.at_gk.tolist()):
        own = [at for at in blocks if at < len(slot_of_b)]
        assert own == (slot_of_b == slot).nonzero()[:, 0].tolist()
