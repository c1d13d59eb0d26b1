"""Frozen layers kept and multiplied in e4m3 against their definition."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels.e4m3 import E4M3
from tunefork.kernels.fp8 import fp8_dense, fp8_linear, fp8_weight


def _weights(features_in: int, *sizes: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, features_in).bfloat16() * features_in**-0.5 for size in sizes]


def test_codes_are_the_weights_over_their_rows_scales() -> None:
    weights = _weights(64, 32, 16)
    weights[0][3] = 0
    weights[1][4] *= 1e4
    codes, scale = fp8_weight(weights)
    assert codes.dtype == E4M3 and codes.shape == (48, 64) and scale.shape == (1, 48)
    whole, dense = torch.cat(weights).float(), fp8_dense(codes, scale, torch.float32)
    # Half a step: 2**-4 of a number, or of the least one that has all bits of its mantissa.
    assert ((dense - whole).abs() <= (whole.abs() * 1.001).clamp(min=2**-6 * scale.t()) / 16).all()
    largest = codes.float().abs().amax(1)
    assert largest[3] == 0 and (largest[torch.arange(48) != 3] == 448).all()
    own = fp8_dense(codes[32:], scale[:, 32:], torch.bfloat16)
    assert torch.equal(own, dense[32:].bfloat16())


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_layers_are_within_e4m3s_rounding(size: float) -> None:
    sizes = (96, 32)
    weights = _weights(64, *sizes)
    x = (torch.randn(3, 11, 64) * size).bfloat16()
    found = fp8_linear(x, *fp8_weight([weights[0] * size, weights[1]]), sizes)
    for y, weight in zip(found, (weights[0] * size, weights[1]), strict=True):
        truth = x.double() @ weight.double().t()
        assert y.dtype == torch.bfloat16 and y.shape == truth.shape
        # e4m3 has 3 bits of mantissa: a value is off by 2**-4 / sqrt(3) at most in the mean square,
        # so each of the two factors adds 2.5 % to a product's relative error.
        assert 0.01 < (y.double() - truth).norm() / truth.norm() < 0.05


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_leaves_the_others_alone(value: float) -> None:
    layer = fp8_weight(_weights(64, 32))
    x = torch.randn(8, 64).bfloat16()
    [before] = fp8_linear(x, *layer, (32,))
    x[3, 7] = value
    [after] = fp8_linear(x, *layer, (32,))
    others = torch.arange(8) != 3
    assert torch.equal(after[others], before[others])
    assert not after[3].isfinite().any()
