"""The fused DoRA layer against its definition, and the expanded row norms against float64."""

import pytest
import torch
from torch import nn

from tunefork.kernels import dora, reference
from tunefork.model.dora import DoraLinear

SHAPES = [((3, 5), 8, 12, 4), ((1, 1), 16, 16, 1), ((13,), 9, 5, 3), ((2, 0), 8, 12, 4)]


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("batch", "d", "o", "r"), SHAPES)
def test_equals_the_definition_in_fp64(
    batch: tuple[int, ...], d: int, o: int, r: int, bias: bool
) -> None:
    x = _draw(*batch, d, seed=1).requires_grad_()
    weight, bias_o = _draw(o, d, seed=2), _draw(o, seed=3) if bias else None
    a, b = _draw(r, d, seed=4).requires_grad_(), _draw(o, r, seed=5).requires_grad_()
    m = _draw(o, seed=6).requires_grad_()
    expected = reference.dora_linear(x, weight, bias_o, a, b, m, 0.7)
    squares = dora.row_squares(weight)
    actual = dora.dora_linear(x, lambda: weight, bias_o, a, b, m, 0.7, squares)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    upstream = _draw(*expected.shape, seed=7)
    for got, want in zip(
        torch.autograd.grad(actual, (x, a, b, m), upstream),
        torch.autograd.grad(expected, (x, a, b, m), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("undone", [0.0, 0.5, 0.97])
def test_norms_are_right_where_the_delta_undoes_the_weight(undone: float) -> None:
    """A rank-1 weight of which the delta takes away a share: only the rest is left to measure."""
    b, a = _draw(64, 1, seed=1), _draw(1, 512, seed=2)
    weight = (b @ a).float()
    lora_a, lora_b = a.float(), (-undone * b).float()
    truth = (weight.double() + lora_b.double() @ lora_a.double()).norm(dim=1)
    found = dora.row_norms(weight, lora_a, lora_b, 1.0, dora.row_squares(weight))
    error = ((found - truth).abs() / truth).max()
    # The module's bound, times 8 for the sums' own roundings.
    assert error < 8 * 2**-24 * ((1 + undone) / (1 - undone)) ** 2


def test_a_row_that_is_undone_wholly_stays_finite() -> None:
    weight = _draw(4, 8).float()
    squares = dora.row_squares(weight)
    found = dora.row_norms(weight, weight, -torch.eye(4), 1.0, squares)
    assert bool((found > 0).all()) and bool(torch.isfinite(found).all())


def test_large_weights_are_widened_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _draw(7, 16).float()
    whole = dora.row_squares(weight)
    monkeypatch.setattr(dora, "_CHUNK", 40)  # two rows at a time
    torch.testing.assert_close(dora.row_squares(weight), whole)


def test_bf16_is_as_close_to_the_truth_as_the_definition() -> None:
    x, weight = _draw(64, 96, seed=1).bfloat16(), _draw(80, 96, seed=2).bfloat16()
    a, b = _draw(8, 96, seed=3).float(), _draw(80, 8, seed=4).float()
    m = weight.float().norm(dim=1)
    operands = (a.double(), b.double(), m.double(), 0.1)
    truth = reference.dora_linear(x.double(), weight.double(), None, *operands)
    squares = dora.row_squares(weight)
    actual = dora.dora_linear(x, lambda: weight, None, a, b, m, 0.1, squares)
    assert (actual.double() - truth).norm() / truth.norm() < 5 * 2**-9


def test_the_untrained_layer_is_its_base_and_the_merged_weight_its_function() -> None:
    linear = nn.Linear(12, 7)
    layer = DoraLinear(linear, rank=3, scale=0.5, dropout=0.0)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-6, atol=1e-6)
    layer.lora_b.data.normal_()
    layer.magnitude.data.mul_(1.5)
    merged = torch.nn.functional.linear(x, layer.merged_weight(), linear.bias)
    torch.testing.assert_close(layer(x), merged, rtol=1e-5, atol=1e-5)
