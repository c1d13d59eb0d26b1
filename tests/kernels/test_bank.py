"""Many adapters in one pass against the definition: values, gradients, and who can hurt whom."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tunefork.kernels import reference
from tunefork.kernels.bank import Padded, add_segments, grouped, padded_rank, spans
from tunefork.kernels.bank_tokens import bank_tokens

FEATURES, OUT = 32, 24
RANKS = (4, 0, 16, 1, 3)
SCALES = (0.5, 1.0, 2.0, 0.25, 3.0)
LENGTHS = (7, 5, 0, 8, 12)


def _bounds(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(spans(lengths))


def _slots(lengths: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def _rows(ranks: Sequence[int], width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(ranks), width, generator=generator)


def _by_definition(
    x: Tensor, slots: Tensor, rows_a: Tensor, rows_b: Tensor, ranks: Sequence[int]
) -> Tensor:
    own = [(rows_a[s:e], rows_b[s:e].t()) if s < e else (None, None) for s, e in spans(ranks)]
    zero = torch.zeros(rows_b.shape[1], x.shape[1], dtype=x.dtype)
    a, b = zip(*own, strict=True)
    return reference.bank_linear(x, zero, None, slots, a, b, SCALES)


def _loop(
    x: Tensor, rows_a: Tensor, rows_b: Tensor, lengths: Sequence[int], ranks: Sequence[int] = RANKS
) -> Tensor:
    y = torch.zeros(x.shape[0], rows_b.shape[1], dtype=x.dtype)
    return add_segments(y, x, rows_a, rows_b, tuple(ranks), _bounds(lengths), SCALES)


def _grouped(
    x: Tensor, rows_a: Tensor, rows_b: Tensor, lengths: Sequence[int], ranks: Sequence[int] = RANKS
) -> Tensor:
    padded = Padded.of(ranks, padded_rank(ranks), SCALES, x.device)
    ends = torch.tensor([last for _, last in _bounds(lengths)], dtype=torch.int32)
    return grouped(x, ends, [rows_a], [rows_b], [0], [padded])[0]


def _batched(
    x: Tensor, rows_a: Tensor, rows_b: Tensor, lengths: Sequence[int], ranks: Sequence[int] = RANKS
) -> Tensor:
    padded = Padded.of(ranks, padded_rank(ranks), SCALES, x.device)
    ends = torch.zeros(len(ranks), dtype=torch.int32)  # not read
    return grouped(x, ends, [rows_a], [rows_b], [0], [padded], is_even=True)[0]


FORMS = {"loop": _loop, "grouped": _grouped, "batched": _batched}
EVEN = (6, 6, 6, 6, 6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [RANKS, (16, 16, 16, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_definitions(
    form: str, ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    lengths = EVEN if form == "batched" else LENGTHS
    x = torch.randn(sum(lengths), FEATURES).to(dtype).requires_grad_()
    rows_a, rows_b = (_rows(ranks, n, i).requires_grad_() for i, n in enumerate((FEATURES, OUT)))
    dy = torch.randn(len(x), OUT).to(dtype)
    found = []
    for name in (form, "definition"):
        for tensor in (x, rows_a, rows_b):
            tensor.grad = None
        if name == "definition":
            y = _by_definition(x, _slots(lengths), rows_a, rows_b, ranks)
        else:
            y = FORMS[name](x, rows_a, rows_b, lengths, ranks)
        y.backward(dy)
        found.append([y.detach(), *(t.grad.clone() for t in (x, rows_a, rows_b))])  # type: ignore[union-attr]
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == expected.dtype
        relative = (actual - expected).float().norm() / expected.float().norm()
        # Sums in another order; in bf16 also s A rounded once, not A and then s times a product.
        assert relative < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sick", [0, 3])
def test_an_adapter_that_is_not_finite_changes_no_bit_of_the_others(form: str, sick: int) -> None:
    torch.manual_seed(0)
    lengths = EVEN if form == "batched" else LENGTHS
    bad = slice(*spans(RANKS)[sick])
    found = []
    for value in (1.0, float("nan"), float("inf")):
        x = torch.randn(sum(lengths), FEATURES, generator=torch.Generator().manual_seed(1))
        rows_a, rows_b = (_rows(RANKS, n, i) for i, n in enumerate((FEATURES, OUT)))
        rows_a[bad] *= value
        rows_b[bad] *= value
        for tensor in (x, rows_a, rows_b):
            tensor.requires_grad_()
        y = FORMS[form](x, rows_a, rows_b, lengths)
        dy = torch.ones_like(y)
        dy[slice(*_bounds(lengths)[sick])] *= value
        y.backward(dy)
        own_rows = [q for q in range(sum(RANKS)) if not bad.start <= q < bad.stop]
        assert x.grad is not None and rows_a.grad is not None and rows_b.grad is not None
        others = [rows_a.grad[own_rows], rows_b.grad[own_rows]]
        own = _slots(lengths) != sick
        found.append([y.detach()[own], x.grad[own], *others])
        assert (value == 1.0) == bool(y.isfinite().all())
    for spoilt in found[1:]:
        for actual, expected in zip(spoilt, found[0], strict=True):
            assert torch.equal(actual, expected)


def test_several_layers_with_one_input_are_each_its_own() -> None:
    torch.manual_seed(0)
    second = (2, 3, 0, 5, 16)
    x = torch.randn(sum(LENGTHS), FEATURES)
    layers = [
        (ranks, _rows(ranks, FEATURES, seed), _rows(ranks, out, seed + 10))
        for seed, (ranks, out) in enumerate(((RANKS, OUT), (second, 40)))
    ]
    ends = torch.tensor([last for _, last in _bounds(LENGTHS)], dtype=torch.int32)
    rank = padded_rank((*RANKS, *second))
    padded = [Padded.of(ranks, rank, SCALES, x.device) for ranks, _, _ in layers]
    together = grouped(
        x, ends, [a for _, a, _ in layers], [b for _, _, b in layers], [0, 1], padded
    )
    for (ranks, a, b), delta in zip(layers, together, strict=True):
        expected = _by_definition(x, _slots(LENGTHS), a, b, ranks)
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-4)


def test_each_token_reads_the_adapter_that_it_names() -> None:
    torch.manual_seed(0)
    slots, rank = 5, 16
    a, b = torch.randn(slots, rank, FEATURES), torch.randn(slots, rank, OUT)
    x, index = torch.randn(23, FEATURES), torch.randint(-1, slots, (23,), dtype=torch.int32)
    expected = reference.bank_linear(
        x, torch.zeros(OUT, FEATURES), None, index, list(a), list(b.transpose(1, 2)), [1.0] * slots
    )
    assert not expected[index < 0].any() and (index < 0).any()
    torch.testing.assert_close(bank_tokens(x, index, a, b), expected, rtol=1e-4, atol=1e-4)
