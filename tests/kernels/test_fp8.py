"""The FP8 LoRA layer against its definition, values and gradients."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels import fp8, fp8_weight, reference
from tunefork.kernels.adamw import mix
from tunefork.kernels.layout import Layout, Storage
from tunefork.kernels.quantized import dequantize_nf4, nf4_tensors, quantize_nf4


def _operands(tokens: int, d: int, o: int, r: int, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * size

    return {
        "x": draw(tokens, d).bfloat16().requires_grad_(),
        "weight": draw(o, d, size=d**-0.5).bfloat16(),
        "a": draw(r, d, size=d**-0.5).requires_grad_(),
        "b": draw(o, r, size=1e-2).requires_grad_(),
    }


def _error(actual: Tensor, truth: Tensor) -> float:
    actual, truth = actual.detach().double(), truth.detach().double()
    return float((actual - truth).norm() / truth.norm())


def _stored(
    storage: Storage, weight: Tensor, a: Tensor, scale: float
) -> tuple[Layout, tuple[Tensor, ...]]:
    layout = Layout(storage, "fp8", (weight.shape[0],), (a.shape[0],), scale)
    own = nf4_tensors(*quantize_nf4(weight)) if storage == "nf4" else [weight]
    return layout, fp8_weight.fp8_weights(own, layout, weight.shape[1])


@pytest.mark.parametrize("storage", ["e4m5", "fp8", "nf4"])
@pytest.mark.parametrize("size", [0.01, 1.0])
@pytest.mark.parametrize(
    ("tokens", "d", "o", "r"), [(33, 64, 96, 4), (1, 128, 64, 1), (70, 96, 32, 16)]
)
def test_values_and_gradients_are_within_e4m3s_rounding(
    storage: Storage, tokens: int, d: int, o: int, r: int, size: float
) -> None:
    """With small weights A and B would saturate beside them, were they not balanced."""
    operands = _operands(tokens, d, o, r)
    x, weight, a, b = operands.values()
    weight = weight * size
    if storage == "nf4":
        weight = dequantize_nf4(*quantize_nf4(weight))
    layout, weights = _stored(storage, weight, a, 2.0)
    [actual] = fp8.fp8_lora(x, layout, weights, [a], [b])
    truth_inputs = [t.detach().double().requires_grad_() for t in (x, a, b)]
    truth = reference.lora_linear(
        truth_inputs[0], weight.double(), None, truth_inputs[1], truth_inputs[2], 2.0
    )
    # e4m3 has 3 bits of mantissa: a value is off by 2**-4 / sqrt(3) at most in the mean square, so
    # each of the two factors adds 2.5 % to a product's relative error; one drawn at random 3.6 %.
    assert _error(actual, truth) < 0.05
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = torch.autograd.grad(actual, (x, a, b), upstream)
    want = torch.autograd.grad(truth, truth_inputs, upstream.double())
    assert _error(got[0], want[0]) < 0.05
    # No FP8 in these: bf16 roundings only.
    assert _error(got[1], want[1]) < 4 * 2**-9
    assert _error(got[2], want[2]) < 4 * 2**-9


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0, 100.0])
def test_the_delta_keeps_about_bf16s_precision_at_every_size(size: float) -> None:
    operands = _operands(64, 128, 96, 8)
    x, weight, a, b = operands.values()
    b = b.detach() * (size / 1e-2)
    layout = Layout("e4m5", "fp8", (96,), (8,), 2.0)
    weights = fp8_weight.fp8_weights([torch.zeros_like(weight)], layout, 128)
    weights[2].fill_(weight.abs().max() / 448.0)  # the scales that the weight would have
    # A weight of zeros leaves the delta, which it would hide in the product's bf16 result.
    [delta] = fp8.fp8_lora(x, layout, weights, [a], [b])
    truth = 2.0 * (x.double() @ a.double().t()) @ b.double().t()
    # 2**-8 for each of two factors, and bf16's rounding of A and u; tiny ones are subnormal.
    assert _error(delta, truth) < (0.02 if size >= 1e-4 else 0.2)


def test_one_rows_outlier_leaves_the_others_alone() -> None:
    operands = _operands(8, 64, 32, 4)
    x, weight, a, b = operands.values()
    layout, weights = _stored("e4m5", weight, a, 1.0)
    [before] = fp8.fp8_lora(x, layout, weights, [a], [b])
    spoilt = x.detach().clone()
    spoilt[3] = float("nan")
    [after] = fp8.fp8_lora(spoilt, layout, weights, [a], [b])
    others = [i for i in range(8) if i != 3]
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)
    assert after[3].isnan().all()


@pytest.mark.parametrize("storage", ["e4m5", "fp8", "nf4"])
@pytest.mark.parametrize("zero", ["row", "column"])
def test_a_row_of_zeros_leaves_the_delta_and_the_other_rows_alone(
    storage: Storage, zero: str
) -> None:
    """With a scale of its own, next to nothing, it took B, and then x, out of e4m3's range."""
    given = _operands(33, 64, 96, 4)
    weight = given["weight"].clone()
    (weight if zero == "row" else weight.t())[5] = 0
    layout, weights = _stored(storage, weight, given["a"], 2.0)
    dense = dequantize_nf4(*quantize_nf4(weight)) if storage == "nf4" else weight
    x, a, b = given["x"], given["a"], given["b"]
    [y] = fp8.fp8_lora(x, layout, weights, [a], [b])
    [dx] = torch.autograd.grad(y, x, torch.ones_like(y))
    whole = dense.double() + 2.0 * b.double() @ a.double()
    assert _error(y, x.double() @ whole.t()) < 0.06
    assert _error(dx, torch.ones_like(y).double() @ whole) < 0.06


@pytest.mark.parametrize("storage", ["e4m5", "nf4"])
def test_a_weight_of_the_backward_product_is_drawn_by_its_seed(storage: Storage) -> None:
    """Rows of dy with one value each have exact codes, so that dx shows the weights alone."""
    x, weight, a, b = _operands(96, 64, 96, 4).values()
    layout, weights = _stored(storage, weight, a, 2.0)
    truth = fp8_weight.dense(layout, weights, 64, torch.float32, 0, 1).double()

    def drawn(seed: int, power: int = 0) -> Tensor:
        x.grad = None
        numbers = torch.tensor([seed, seed + 1000, 2000, 3000], dtype=torch.int32)
        seeded = fp8_weight.with_seed(weights, layout, mix(numbers))
        [y] = fp8.fp8_lora(x, layout, seeded, [a], [torch.zeros_like(b)])
        y.backward(torch.eye(96).bfloat16() * 2.0**power)
        assert x.grad is not None
        return x.grad.double() / 2.0**power

    draws = [drawn(seed) for seed in range(40)]
    assert torch.equal(drawn(3, power=5), draws[3])  # whatever dy is
    one = sum(_error(draw, truth) for draw in draws) / len(draws)
    assert 0.02 < one < 0.06
    assert _error(torch.stack(draws).mean(0), truth) < 0.25 * one
