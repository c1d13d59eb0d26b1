"""What a CPU's slots tell a pass."""

import torch

from tests.tiny import tiny_model
from tunefork.kernels.bank_stretches import Stretch
from tunefork.model.bank import add_serving_bank
from tunefork.serve.engines.adapter_file import HostAdapter
from tunefork.serve.engines.slots import BankSlots


def test_a_pass_of_the_same_requests_is_laid_out_once() -> None:
    bank = add_serving_bank(tiny_model("llama"), slots=2, rank=32)
    slots, index, told = BankSlots(bank), torch.tensor([1]), [Stretch(1, 0, 1)]
    slots.load(1, HostAdapter({}, 4, 0))
    slots.route(index, told)
    first = bank.routing.layout
    slots.route(index, list(told))
    assert first is not None and bank.routing.layout is first
    slots.load(1, HostAdapter({}, 20, 0))  # another adapter's rank: more of the slot is read
    slots.route(index, told)
    assert bank.routing.layout is not None and bank.routing.layout.runs[0].pieces == (2,)
    slots.route(index, [*told, Stretch(1, 1, 2)])
    assert bank.routing.layout.runs[0].slots == (1, 1)
    slots.route(index, [])
    assert bank.routing.mode == "none"
