"""The fused LoRA layer against its definition, values and gradients."""

from typing import Any

import pytest
import torch

from tunefork.kernels import dora, lora, reference

SHAPES = [
    ((3, 5), 8, 12, 4),
    ((1, 1), 16, 16, 1),
    ((2, 7), 9, 5, 3),
    ((13,), 8, 24, 8),
    ((2, 0), 8, 12, 4),  # as of an expert that no token is sent to
]


def _operands(
    batch: tuple[int, ...], d: int, o: int, r: int, dtype: torch.dtype, bias: bool
) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(hash((batch, d, o, r)) % 2**31)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "x": draw(*batch, d).requires_grad_(),
        "weight": draw(o, d),
        "bias": draw(o) if bias else None,
        "a": draw(r, d, dtype=torch.float32).requires_grad_(),
        "b": draw(o, r, dtype=torch.float32).requires_grad_(),
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("batch", "d", "o", "r"), SHAPES)
def test_equals_the_definition_in_fp64(
    batch: tuple[int, ...], d: int, o: int, r: int, bias: bool
) -> None:
    operands = _operands(batch, d, o, r, torch.float64, bias)
    x, weight, b = operands["x"], operands["weight"], operands["bias"]
    lora_a, lora_b = operands["a"], operands["b"]
    assert x is not None and weight is not None and lora_a is not None and lora_b is not None
    expected = reference.lora_linear(x, weight, b, lora_a, lora_b, 0.7)
    actual = lora.lora_linear(x, lambda: weight, b, lora_a, lora_b, 0.7)
    # Only the order of fp64 sums differs; A's and B's gradients are rounded to fp32.
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    for got, want, tolerance in zip(
        torch.autograd.grad(actual, (x, lora_a, lora_b), upstream),
        torch.autograd.grad(expected, (x, lora_a, lora_b), upstream),
        (1e-10, 1e-5, 1e-5),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_bf16_is_as_close_to_the_truth_as_the_definition() -> None:
    operands = _operands((64,), 96, 80, 8, torch.bfloat16, False)
    x, weight = operands["x"], operands["weight"]
    lora_a, lora_b = operands["a"], operands["b"]
    assert x is not None and weight is not None and lora_a is not None and lora_b is not None
    truth = reference.lora_linear(
        x.double(), weight.double(), None, lora_a.double(), lora_b.double(), 0.5
    )
    actual = lora.lora_linear(x, lambda: weight, None, lora_a, lora_b, 0.5)
    # bf16 keeps 8 bits: roundings of A, B, the rank-R product and the result, each 2^-9 relative.
    error = (actual.double() - truth).norm() / truth.norm()
    assert error < 4 * 2**-9


def test_an_input_without_gradient_costs_none() -> None:
    asked = 0

    def weight() -> torch.Tensor:
        nonlocal asked
        asked += 1
        return torch.ones(3, 2)

    x, a, b = torch.ones(4, 2), torch.ones(1, 2, requires_grad=True), torch.ones(3, 1)
    lora.lora_linear(x, weight, None, a, b.requires_grad_(), 1.0).sum().backward()
    assert asked == 1  # the first layer's backward pass does not dequantise
    assert a.grad is not None


def test_a_frozen_layer_equals_the_definition_and_keeps_no_weight() -> None:
    operands = _operands((3, 5), 8, 12, 4, torch.float64, True)
    x, weight, bias = operands["x"], operands["weight"], operands["bias"]
    assert x is not None and weight is not None
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        actual = lora.frozen_linear(x, lambda: weight, bias)
    assert not kept
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(actual, expected)
    (got,) = torch.autograd.grad(actual.square().sum(), x)
    (want,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(got, want)


def test_the_result_may_be_changed_in_place() -> None:
    x, a, b = torch.ones(1, 4, 2), torch.ones(1, 2, requires_grad=True), torch.ones(3, 1)
    y = lora.lora_linear(x, lambda: torch.ones(3, 2), None, a, b.requires_grad_(), 1.0)
    y.mul_(2.0)  # as Falcon's rotary embedding does
    y.sum().backward()
    assert a.grad is not None and a.grad.tolist() == [[24.0, 24.0]]


@pytest.mark.parametrize("is_dora", [False, True])
def test_a_small_delta_is_not_rounded_away(is_dora: bool) -> None:
    """Of one that is a 4,096th of the base's bf16 product, and of its input gradient: 16 % are left
    where that product is rounded before the sum is."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16()

    x, w, dy = normal(512, 128).requires_grad_(), normal(192, 128), normal(512, 192)
    a, b = normal(8, 128), normal(192, 8) * 2.0**-12
    if is_dora:
        squares = dora.row_squares(w)
        y = dora.dora_linear(x, lambda: w, None, a, b, squares.sqrt(), 0.5, squares)
    else:
        y = lora.lora_linear(x, lambda: w, None, a, b, 0.5)
    [dx] = torch.autograd.grad(y, x, dy)
    wide, delta = w.double(), 0.5 * b.double() @ a.double()
    for found, left, right in ((y, x, (wide.t(), delta.t())), (dx, dy, (wide, delta))):
        base, small = (left.detach().double() @ one for one in right)
        kept = ((found.double() - base) * small).sum() / small.square().sum()
        assert abs(kept - 1) < 0.2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
@pytest.mark.parametrize("is_dora", [False, True])
def test_a_compiler_sees_nothing_changed_in_place(is_dora: bool) -> None:
    """Torch 2.11 lost all gradients of a Function that changes its own (`test_gpu_engine.py`)."""
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(12, 8)
    a, b = torch.randn(4, 8, requires_grad=True), torch.randn(12, 4, requires_grad=True)
    m, squares = torch.ones(12, requires_grad=True), dora.row_squares(w)
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        seen.extend(
            str(node.target)
            for part in graph.modules()
            if isinstance(part, torch.fx.GraphModule)
            for node in part.graph.nodes
            if node.op in ("call_function", "call_method")
        )
        return graph

    def layer(x: torch.Tensor) -> torch.Tensor:
        if is_dora:
            return dora.dora_linear(x, lambda: w, None, a, b, m, 0.5, squares)
        return lora.lora_linear(x, lambda: w, None, a, b, 0.5)

    torch._dynamo.reset()
    inputs = (x, a, b)
    want = torch.autograd.grad(layer(x).square().sum(), inputs)
    got = torch.autograd.grad(torch.compile(layer, backend=look)(x).square().sum(), inputs)
    torch.testing.assert_close(got, want)
    assert any("addmm" in name for name in seen)
    assert not [name for name in seen if name.endswith("_") and not name.endswith("__")]
