"""The LoRA layer with int8 products against its definition, values and gradients."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels import int8, int8_weight, reference
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
    layout = Layout(storage, "int8", (weight.shape[0],), (a.shape[0],), scale)
    own = nf4_tensors(*quantize_nf4(weight)) if storage == "nf4" else [weight]
    return layout, int8_weight.int8_weights(own, layout, weight.shape[1])


@pytest.mark.parametrize("storage", ["int8", "nf4"])
@pytest.mark.parametrize("size", [0.01, 1.0])
@pytest.mark.parametrize(
    ("tokens", "d", "o", "r"), [(33, 64, 96, 4), (1, 128, 64, 1), (70, 96, 32, 16)]
)
def test_values_and_gradients_are_within_int8s_rounding(
    storage: Storage, tokens: int, d: int, o: int, r: int, size: float
) -> None:
    operands = _operands(tokens, d, o, r)
    x, weight, a, b = operands.values()
    weight = weight * size
    if storage == "nf4":
        weight = dequantize_nf4(*quantize_nf4(weight))
    layout, weights = _stored(storage, weight, a, 2.0)
    [actual] = int8.int8_lora(x, layout, weights, [a], [b])
    truth_inputs = [t.detach().double().requires_grad_() for t in (x, a, b)]
    truth = reference.lora_linear(
        truth_inputs[0], weight.double(), None, truth_inputs[1], truth_inputs[2], 2.0
    )
    # A row's largest of D normal numbers is at most 4.2 of their root mean squares here, a step a
    # 127th of it, so that each of two factors is off by 4.2 / 127 / sqrt(12), about 1 %.
    assert _error(actual, truth) < 0.015
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = torch.autograd.grad(actual, (x, a, b), upstream)
    want = torch.autograd.grad(truth, truth_inputs, upstream.double())
    assert _error(got[0], want[0]) < 0.015
    # No codes in these: bf16 roundings only.
    assert _error(got[1], want[1]) < 4 * 2**-9
    assert _error(got[2], want[2]) < 4 * 2**-9


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_layers_with_one_input_are_as_each_is_alone(storage: Storage) -> None:
    """Two with deltas of other ranks, one between them without; their gradients too."""
    sizes, ranks = (64, 32, 64), (5, 0, 12)
    given = [
        _operands(40, 64, o, r, seed=at) for at, (o, r) in enumerate(zip(sizes, ranks, strict=True))
    ]
    x, weights = given[0]["x"], [each["weight"] for each in given]
    if storage == "nf4":
        weights = [dequantize_nf4(*quantize_nf4(weight)) for weight in weights]
    own = [nf4_tensors(*quantize_nf4(w)) if storage == "nf4" else [w] for w in weights]
    layout = Layout(storage, "int8", sizes, ranks, 2.0)
    kept = int8_weight.int8_weights([t for each in own for t in each], layout, 64)
    deltas = [each for each, rank in zip(given, ranks, strict=True) if rank]
    lora_a, lora_b = [each["a"] for each in deltas], [each["b"] for each in deltas]
    ys = int8.int8_lora(x, layout, kept, lora_a, lora_b)
    exact = [t.detach().double().requires_grad_() for t in (x, *lora_a, *lora_b)]
    x_64, a_0, a_2, b_0, b_2 = exact
    truths = [x_64 @ weight.double().t() for weight in weights]
    truths[0] = truths[0] + 2 * (x_64 @ a_0.t()) @ b_0.t()
    truths[2] = truths[2] + 2 * (x_64 @ a_2.t()) @ b_2.t()
    random = torch.Generator().manual_seed(9)
    dys = [torch.randn(y.shape, generator=random).bfloat16() for y in ys]
    got = torch.autograd.grad(ys, (x, *lora_a, *lora_b), dys)
    want = torch.autograd.grad(truths, exact, [dy.double() for dy in dys])
    for ours, theirs in zip((*ys, got[0]), (*truths, want[0]), strict=True):
        assert _error(ours, theirs) < 0.015
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        assert _error(ours, theirs) < 4 * 2**-9


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_the_delta_is_bf16s_at_every_size(size: float) -> None:
    operands = _operands(64, 128, 96, 5)
    x, weight, a, b = operands.values()
    b = b.detach() * size
    layout, weights = _stored("int8", torch.zeros_like(weight), a, 2.0)
    [delta] = int8.int8_lora(x, layout, weights, [a], [b])
    truth = 2.0 * (x.double() @ a.double().t()) @ b.double().t()
    # A, B, u and y are rounded, each by 2**-9 at most.
    assert _error(delta, truth) < 4 * 2**-9


def test_one_rows_outlier_leaves_the_others_alone() -> None:
    operands = _operands(8, 64, 32, 4)
    x, weight, a, b = operands.values()
    layout, weights = _stored("int8", weight, a, 1.0)
    [before] = int8.int8_lora(x, layout, weights, [a], [b])
    spoilt = x.detach().clone()
    spoilt[3] = float("nan")
    [after] = int8.int8_lora(spoilt, layout, weights, [a], [b])
    others = [i for i in range(8) if i != 3]
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)
    assert after[3].isnan().all()


@pytest.mark.parametrize("storage", ["int8", "nf4"])
@pytest.mark.parametrize("zero", ["row", "column"])
def test_a_row_of_zeros_leaves_the_delta_and_the_other_rows_alone(
    storage: Storage, zero: str
) -> None:
    given = _operands(33, 64, 96, 4)
    weight = given["weight"].clone()
    (weight if zero == "row" else weight.t())[5] = 0
    layout, weights = _stored(storage, weight, given["a"], 2.0)
    dense = dequantize_nf4(*quantize_nf4(weight)) if storage == "nf4" else weight
    x, a, b = given["x"], given["a"], given["b"]
    [y] = int8.int8_lora(x, layout, weights, [a], [b])
    [dx] = torch.autograd.grad(y, x, torch.ones_like(y))
    whole = dense.double() + 2.0 * b.double() @ a.double()
    assert _error(y, x.double() @ whole.t()) < 0.02
    assert _error(dx, torch.ones_like(y).double() @ whole) < 0.02


def test_what_a_plain_product_is_made_of_is_nearer_than_the_codes_are() -> None:
    """Along the directions that are multiplied apart it is what was rounded."""
    x, weight, a, _ = _operands(200, 64, 96, 4).values()
    x = x.detach()
    x[:, :3] *= 30
    layout, weights = _stored("int8", weight, a, 1.0)
    truth = x.double() @ weight.double().t()

    def off() -> float:
        return _error(
            x.double() @ int8_weight.dense(layout, weights, 64, torch.float32, 0, 1).double().t(),
            truth,
        )

    before = off()
    int8_weight.set_apart(x, weights, layout, [weight])
    assert off() < 0.4 * before


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_stays_in_its_row(value: float) -> None:
    x, weight, a, b = _operands(8, 64, 32, 4).values()
    layout, weights = _stored("int8", weight, a, 1.0)
    [y] = int8.int8_lora(x, layout, weights, [a], [b])
    upstream = torch.ones_like(y)
    [before] = torch.autograd.grad(y, x, upstream, retain_graph=True)
    upstream[3, 7] = value
    [after] = torch.autograd.grad(y, x, upstream)
    others = [i for i in range(8) if i != 3]
    assert torch.equal(after[others], before[others]) and not after[3].isfinite().any()
