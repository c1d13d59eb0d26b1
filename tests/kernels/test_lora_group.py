"""Groups of LoRA layers over one product against the definition of each, values and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tunefork.kernels import int8_weight, reference
from tunefork.kernels import lora_group as kernel
from tunefork.kernels.bf16_product import bf16_product
from tunefork.kernels.layout import Layout, Storage
from tunefork.kernels.lora_group import lora_group
from tunefork.kernels.quantized import (
    dequantize_nf4,
    dequantize_nf4_tensors,
    nf4_tensors,
    quantize_nf4,
)

SCALE = 0.5
GROUPS = [
    ((24,), (4,)),
    ((32, 16, 16), (4, 0, 2)),
    ((64, 48), (4, 3)),
    ((64, 48), (0, 3)),
    ((32, 16), (0, 0)),
]


@pytest.mark.parametrize(("storage", "in_pieces"), [("bf16", False), ("nf4", False), ("nf4", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sizes", "ranks"), GROUPS)
def test_equals_the_definition(
    sizes: tuple[int, ...],
    ranks: tuple[int, ...],
    dtype: torch.dtype,
    storage: Storage,
    in_pieces: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    if in_pieces:
        monkeypatch.setattr(kernel, "WHOLE_BYTES", 0)
    features = 32
    layout = Layout(storage, "bf16", sizes, ranks, SCALE)
    x = torch.randn(2, 5, features).to(dtype).requires_grad_()
    weights = [torch.randn(size, features).to(dtype) for size in sizes]
    lora_a = [torch.randn(r, features, requires_grad=True) for r in ranks if r]
    lora_b = [torch.randn(o, r, requires_grad=True) for o, r in zip(sizes, ranks, strict=True) if r]
    if storage == "nf4":
        quantized = [quantize_nf4(weight) for weight in weights]
        operands: tuple[Tensor, ...] = sum((nf4_tensors(*q) for q in quantized), ())
        weights = [dequantize_nf4(*q) for q in quantized]
    else:
        operands = (torch.cat(weights),)
    actual = lora_group(x, layout, operands, lora_a, lora_b)
    a, b = iter(lora_a), iter(lora_b)
    inputs = [x, *lora_a, *lora_b]
    # The definition in fp64, of the operands as rounded to `dtype`.
    expected = [
        reference.lora_linear(
            x.double(),
            weight.double(),
            None,
            next(a).to(dtype).double() if rank else torch.zeros(1, features).double(),
            next(b).to(dtype).double() if rank else torch.zeros(weight.shape[0], 1).double(),
            SCALE,
        )
        for weight, rank in zip(weights, ranks, strict=True)
    ]
    upstream = [torch.randn_like(y) for y in actual]
    got = torch.autograd.grad(actual, inputs, upstream)
    want = torch.autograd.grad(expected, inputs, [u.double() for u in upstream])
    # bf16 keeps 8 bits, and a result has up to four roundings.
    bound = 1e-5 if dtype == torch.float32 else 4 * 2**-8
    pairs = [*zip(actual, expected, strict=True), *zip(got, want, strict=True)]
    for ours, truth in pairs:
        assert ours.shape == truth.shape
        assert (ours.double() - truth).norm() <= bound * truth.double().norm()
    for gradient, operand in zip(got, inputs, strict=True):
        assert gradient.dtype == operand.dtype


def test_in_double_precision_nothing_is_rounded_to_less() -> None:
    torch.manual_seed(0)
    layout = Layout("bf16", "bf16", (6, 4), (3, 2), 0.7)  # a scale that fp32 rounds
    shapes = ((5, 8), (3, 8), (2, 8), (6, 3), (4, 2))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(10, 8, dtype=torch.float64)

    def both(x: Tensor, *lora: Tensor) -> tuple[Tensor, ...]:
        return lora_group(x, layout, (weight,), lora[:2], lora[2:])

    assert torch.autograd.gradcheck(both, inputs)


def test_gradients_of_a_group_without_deltas_are_multiplied_as_they_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    product = bf16_product

    def noting(parts: Any, *more: Any, **named: Any) -> Tensor:
        seen.extend(part.data_ptr() for part in parts)
        return product(parts, *more, **named)

    monkeypatch.setattr(kernel, "bf16_product", noting)
    layout = Layout("bf16", "bf16", (32, 16), (0, 0), SCALE)
    x = torch.randn(3, 8, requires_grad=True)
    upstream = [torch.randn(3, size) for size in layout.sizes]
    torch.autograd.backward(lora_group(x, layout, [torch.randn(48, 8)], [], []), upstream)
    assert seen == [dy.data_ptr() for dy in upstream]


def test_of_large_4_bit_layers_one_is_dequantised_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[int, ...]] = []

    def noting(tensors: Any, of: Any, *more: Any) -> Tensor:
        sizes.append(tuple(of))
        return dequantize_nf4_tensors(tensors, of, *more)

    monkeypatch.setattr(int8_weight, "dequantize_nf4_tensors", noting)
    layout = Layout("nf4", "bf16", (64, 48), (4, 0), SCALE)
    quantized = [quantize_nf4(torch.randn(size, 32)) for size in layout.sizes]
    operands: tuple[Tensor, ...] = sum((nf4_tensors(*q) for q in quantized), ())
    a, b = torch.randn(4, 32, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    for most, expected in ((2**28, [(64, 48)]), (112 * 32 * 4 - 1, [(64,), (48,)])):
        monkeypatch.setattr(kernel, "WHOLE_BYTES", most)
        x = torch.randn(3, 32, requires_grad=True)
        first, second = lora_group(x, layout, operands, [a], [b])
        (first.sum() + second.sum()).backward()
        assert sizes == 2 * expected
        sizes.clear()


def test_of_large_layers_in_eight_bits_one_is_made_dense_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[int, ...]] = []
    dense = int8_weight.dense

    def noting(*args: Any) -> Tensor:
        made.append(args[4:])
        return dense(*args)

    monkeypatch.setattr(kernel, "dense", noting)
    layout = Layout("int8", "int8", (64, 48), (0, 0), SCALE)
    weights = int8_weight.int8_weights([torch.randn(size, 32) for size in layout.sizes], layout, 32)
    x, found = torch.randn(3, 32), []
    for most, expected in ((2**28, [(0, 2)]), (112 * 32 * 4 - 1, [(0, 1), (1, 2)])):
        monkeypatch.setattr(kernel, "WHOLE_BYTES", most)
        found.append(torch.cat(lora_group(x, layout, weights, [], []), dim=1))
        assert made == expected
        made.clear()
    torch.testing.assert_close(*found)
