"""What a CPU's slots tell a pass."""

from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from tests.serve.test_ferry import deltas
from tests.tiny import tiny_model
from tunefork.kernels.bank_stretches import Stretch
from tunefork.model.add_bank import add_serving_bank
from tunefork.model.own_rows import keep_rows
from tunefork.serve.engines.adapter_file import HostAdapter
from tunefork.serve.engines.slots import BankSlots


def test_a_pass_of_the_same_requests_is_laid_out_once() -> None:
    bank = add_serving_bank(tiny_model("llama"), slots=2, rank=32)
    for layer in bank.layers.values():
        keep_rows([layer])
    slots, index, told = BankSlots(bank), torch.tensor([1]), [Stretch(1, 0, 1)]
    slots.load(1, HostAdapter({}, 4, 0))
    slots.route(index, told)
    first = bank.routing.layout
    slots.route(index, list(told))
    assert first is not None and bank.routing.layout is first
    slots.load(1, HostAdapter({}, 20, 0))  # another adapter's rank: more of the slot is read
    slots.route(index, told)
    assert bank.routing.layout is not None and bank.routing.layout.pieces == (2,)
    slots.route(index, [*told, Stretch(1, 1, 2)])
    assert bank.routing.layout.stretches == (Stretch(1, 0, 1), Stretch(1, 1, 2))
    slots.route(index, [])
    assert bank.routing.mode == "none"


def test_rows_on_a_gpu_are_written_by_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 on a GPU: no parts, which would be written to copies of rows."""
    bank = add_serving_bank(tiny_model("llama"), slots=2, rank=32)
    for layer in bank.layers.values():
        keep_rows([layer])
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    slots, waited = BankSlots(bank), Mock()
    slots._stream = waited
    found = deltas(bank, 20, torch.float32)
    slots.load(1, HostAdapter(found, 20, 0))
    waited.synchronize.assert_called_once()
    for path, (_, b_or) in bank.adapter(1).items():
        assert torch.equal(b_or, found[path].lora_b)
    assert bank.adapter(1).keys() == found.keys()


@pytest.mark.parametrize("mode", ["tokens", "load in parts"])
def test_kept_rows_are_not_taken_for_matrices(mode: str) -> None:
    """They would be read as no delta, or written to a copy."""
    model = tiny_model("llama")
    bank = add_serving_bank(model, slots=2, rank=32)
    for layer in bank.layers.values():
        keep_rows([layer])
    with pytest.raises(AssertionError):
        if mode == "tokens":
            bank.route_tokens(torch.ones(4, dtype=torch.int32))
            model(input_ids=torch.arange(4)[None])
        else:
            bank.load_parts(0, {}, [])
