"""MLPs that are SwiGLU get a form of their own over a read bank, and no others."""

import pytest
import torch

from tests.tiny import tiny_model
from tunefork.model.bank import add_serving_bank
from tunefork.model.fused import fuse
from tunefork.model.swiglu import SwiGLU, fuse_swiglu


@pytest.mark.parametrize(("architecture", "count"), [("llama", 2), ("gemma3", 0), ("phi3", 0)])
def test_it_says_what_the_mlp_said(architecture: str, count: int) -> None:
    model = tiny_model(architecture)
    bank = add_serving_bank(model, slots=2, rank=16)
    for group in fuse(model, "bf16", "bf16", torch.device("cpu")):
        group.join_banks()
    torch.manual_seed(0)
    bank.load(
        1,
        {
            path: (torch.randn(4, la.in_features), torch.randn(la.out_features, 4), 0.1)
            for path, la in bank.layers.items()
        },
    )
    ids = torch.arange(24).view(2, 12)
    routed = torch.tensor([1, -1, 0]).repeat_interleave(8).int()
    said = []
    for turn in range(2):
        if turn:
            assert fuse_swiglu(model) == count
        for route in (bank.route_none, lambda: bank.route_tokens(routed)):
            route()
            said.append(model(input_ids=ids).logits)
        bank.route_none()
    assert sum(isinstance(module, SwiGLU) for module in model.modules()) == count
    assert not torch.allclose(said[0], said[1], atol=1e-2)
    torch.testing.assert_close(said[2:], said[:2], rtol=1e-4, atol=1e-5)


def test_an_mlp_that_says_something_else_stays() -> None:
    model = tiny_model("llama")
    mlp = type(model.model.layers[0].mlp)
    add_serving_bank(model, slots=1, rank=16)
    for group in fuse(model, "bf16", "bf16", torch.device("cpu")):
        group.join_banks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mlp, "forward", lambda own, x: own.down_proj(own.gate_proj(x) + own.up_proj(x))
        )
        assert fuse_swiglu(model) == 0
