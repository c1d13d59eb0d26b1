"""The trial of int8 products computes what its definition does, an MLP as one function too."""

import pytest
import torch
from torch import Tensor

from benchmarks.int8_emulated import emulated
from benchmarks.int8_trial import built
from tests.kernels.test_fp8_gated import Operands, gated, of_groups, operands
from tunefork.kernels import fp8_gated


def _all(function: object, groups: Operands, inputs: list[Tensor]) -> list[Tensor]:
    """The result and every gradient."""
    y = function(groups, *inputs)  # type: ignore[operator]
    torch.manual_seed(1)
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.randn_like(y))]


@pytest.mark.parametrize("function", [of_groups, gated])
def test_it_is_the_definition(function: object) -> None:
    """Definition and kernels round at the same places but for a bf16's last bit."""
    before = fp8_gated._Fp8Gated
    with emulated():
        groups, inputs = operands("e4m5")
        wanted = _all(of_groups, groups, inputs)
    with built():
        groups, inputs = operands("e4m5")
        found = _all(function, groups, inputs)
    assert fp8_gated._Fp8Gated is before
    for got, want in zip(found, wanted, strict=True):
        assert float((got - want).float().norm() / want.float().norm()) < 0.006
