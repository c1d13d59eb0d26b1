"""The global norm and the factor that follows from it."""

import math

import pytest
import torch
from torch import nn

from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.clip import clip_factor, global_norm
from tunefork.train.optim import ShadowAdamW


def _with_gradients(*gradients: torch.Tensor) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


def test_the_norm_is_of_all_gradients_together() -> None:
    parameters = _with_gradients(torch.tensor([3.0]), torch.tensor([4.0]))
    assert global_norm([*parameters, nn.Parameter(torch.ones(2))]) == 5.0
    assert global_norm([nn.Parameter(torch.ones(2))]) == 0.0


def test_the_factor_scales_down_only_and_leaves_what_is_not_finite() -> None:
    assert clip_factor(5.0, 10.0) == 1.0
    assert clip_factor(5.0, 1.0) == pytest.approx(0.2)
    assert clip_factor(5.0, None) == 1.0
    assert clip_factor(math.nan, 1.0) == clip_factor(math.inf, 1.0) == 1.0


@pytest.mark.parametrize("is_flat", [True, False])
def test_both_optimisers_measure_and_scale(is_flat: bool) -> None:
    """A scaled gradient moves a weight like a gradient that was as small from the start."""
    ends = []
    for gradient, scale in ((4.0, 0.25), (1.0, 1.0)):
        [parameter] = parameters = [nn.Parameter(torch.ones(3, 2))]
        options = {"betas": (0.9, 0.999), "weight_decay": 0.0}
        optimizer: LoraAdamW | ShadowAdamW = (
            LoraAdamW(parameters, **options)  # type: ignore[arg-type]
            if is_flat
            else ShadowAdamW(parameters, keep_shadows=False, eight_bit=False, **options)  # type: ignore[arg-type]
        )
        for factor in (1.0, 3.0):  # Adam forgets the scale of one gradient, not of two
            parameter.grad = torch.full((3, 2), gradient * factor)
            assert optimizer.gradient_norm() == pytest.approx(gradient * factor * math.sqrt(6))
            optimizer.step(0.1, scale if factor == 3.0 else 1.0)
        ends.append(optimizer.state_tensors()["0.exp_avg"].clone())
    # 0.9 * 0.1 * g + 0.1 * 3 g * scale, of the first gradient unscaled
    assert float(ends[0][0, 0]) == pytest.approx(0.09 * 4.0 + 0.1 * 3.0)
    assert float(ends[1][0, 0]) == pytest.approx(0.09 + 0.1 * 3.0)


def test_a_long_sum_is_accurate() -> None:
    """Ten million equal terms: one fp32 sum from left to right would stop growing."""
    parameter = nn.Parameter(torch.zeros(10_000_001))
    optimizer = LoraAdamW([parameter], betas=(0.9, 0.999), weight_decay=0.0)
    assert parameter.grad is not None
    parameter.grad.fill_(0.1)
    assert optimizer.gradient_norm() == pytest.approx(0.1 * math.sqrt(10_000_001), rel=1e-6)
