"""An MLP in int8 as one function on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_int8_gated import STORAGES, gated, of_groups, operands
from tunefork.kernels.gated import swiglu
from tunefork.kernels.int8_weight import set_apart
from tunefork.kernels.layout import Storage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("tokens", [60, 2048])
def test_an_mlp_is_that_of_the_groups(storage: Storage, is_compiled: bool, tokens: int) -> None:
    ranks = (16, 16, 16)
    groups, inputs = operands(storage, tokens, ranks, sizes=(256, 640), device="cuda")
    pair, pair_weights, last, last_weights = groups
    x = inputs[0].detach().flatten(0, 1)
    x[:, :8] *= 20  # a few directions to be multiplied apart, of h too
    set_apart(x, pair_weights, pair)
    gate, up = (x.float() @ torch.randn(256, 640, device="cuda") / 16 for _ in range(2))
    set_apart(swiglu(gate.bfloat16(), up.bfloat16()), last_weights, last)
    run: Any = torch.compile(gated, fullgraph=True) if is_compiled else gated
    y, want = run(groups, *inputs), of_groups(groups, *inputs)
    upstream = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(result, inputs, upstream) for result in (y, want))
    torch._dynamo.reset()
    assert _error(y, want) <= 2**-6
    # Roundings to bf16, and codes that these move.
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert _error(ours, theirs) <= 2**-5


def _error(found: Tensor, truth: Tensor) -> float:
    found, truth = found.detach().float(), truth.detach().float()
    return float((found - truth).norm() / truth.norm())
