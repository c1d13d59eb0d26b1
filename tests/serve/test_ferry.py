"""Matrices on their way to a device, through a small piece of memory."""

import torch

from tests.tiny import tiny_model
from tunefork.model.add_bank import add_serving_bank
from tunefork.model.bank import Bank
from tunefork.registry.peft_deltas import Delta, Deltas
from tunefork.serve.engines.ferry import Ferry


def deltas(bank: Bank, rank: int, dtype: torch.dtype, skipped: int = 0) -> Deltas:
    """Random ones of all layers but the first few."""
    return {
        path: Delta(
            torch.randn(rank, layer.in_features).to(dtype),
            torch.randn(layer.out_features, rank).to(dtype),
            1.7,
        )
        for path, layer in list(bank.layers.items())[skipped:]
    }


def test_a_slot_filled_in_parts_is_filled_as_at_once() -> None:
    """Bit for bit, whatever dtype the file has, and whoever was in the slot; what has crossed is
    overwritten no sooner than it has arrived."""
    torch.manual_seed(0)
    model = tiny_model("llama").bfloat16()
    whole = add_serving_bank(model, slots=2, rank=16)
    parted = add_serving_bank(tiny_model("llama").bfloat16(), slots=2, rank=16)
    arrived = 0

    def arrive() -> None:
        nonlocal arrived
        arrived += 1
        ferry.there.fill_(255)  # NaN, to whoever still reads it

    ferry = Ferry(1 << 14, torch.device("cpu"), arrive)
    for rank, dtype, skipped in (
        (16, torch.bfloat16, 0),
        (5, torch.float32, 3),
        (16, torch.float16, 1),
        (3, torch.float64, 0),
    ):
        found, before = deltas(whole, rank, dtype, skipped), arrived
        with torch.inference_mode():
            whole.load(1, found)
            parted.load_parts(1, found, ferry.carry(found))
        assert arrived > before
        assert parted.held == whole.held
        for path, layer in whole.layers.items():
            for one, other in zip(layer.stacks, parted.layers[path].stacks, strict=True):
                assert torch.equal(one, other), (path, dtype)
