"""Rows in int8 on a GPU against their definitions.

A quotient next to the middle of two codes may go to either, as it may have been rounded once or
twice on the way, and bf16's numbers over one another often lie there. The scales are the same but
for their last bit.
"""

import pytest
import torch
from torch import Tensor

from tunefork.kernels.int8_range import LARGEST
from tunefork.kernels.int8_rows import (
    round_apart,
    round_apart_reference,
    round_rows,
    round_rows_reference,
    turned,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Found = tuple[Tensor, Tensor]


def _rows(tokens: int, *sizes: int, beside: int = 0) -> list[Tensor]:
    torch.manual_seed(sum(sizes))
    each = [torch.randn(tokens, size + beside, device="cuda").bfloat16() for size in sizes]
    return [rows[:, :size] for rows, size in zip(each, sizes, strict=True)]


def _assert_same(found: Found, want: Found) -> None:
    (codes, scale), (wanted, of_rows) = found, want
    torch.testing.assert_close(scale, of_rows, rtol=1e-5, atol=0)
    off = (codes.int() - wanted.int()).abs()
    assert int(off.max()) <= 1 and float(off.float().mean()) < 2e-3
    assert (codes.int().abs().amax(1) == LARGEST).all()


@pytest.mark.parametrize("has_fold", [True, False])
@pytest.mark.parametrize(
    ("tokens", "sizes", "beside"),
    [
        (4096, (4096,), 0),
        (512, (4096, 1024, 1024), 0),
        (300, (14_336, 14_336), 16),  # columns of wider tensors
        (77, (64, 48, 32, 16), 1),
        (1, (16,), 0),
    ],
)
def test_gradients_of_layers(
    tokens: int, sizes: tuple[int, ...], beside: int, has_fold: bool
) -> None:
    parts = _rows(tokens, *sizes, beside=beside)
    fold = torch.rand(1, sum(sizes), device="cuda") + 0.5 if has_fold else None
    _assert_same(round_rows(parts, fold), round_rows_reference(parts, fold))


@pytest.mark.parametrize(
    ("tokens", "features", "count", "apart", "beside"),
    [
        (4096, 4096, 64, 48, 0),
        (16_384, 4096, 64, 48, 0),
        (1000, 14_336, 56, 48, 16),
        (77, 592, 48, 48, 1),
        (1, 16, 48, 48, 0),
    ],
)
def test_rows_less_their_directions(
    tokens: int, features: int, count: int, apart: int, beside: int
) -> None:
    [x] = _rows(tokens, features, beside=beside)
    [inner] = _rows(tokens, count, beside=8)
    probe = torch.randn(apart, features, device="cuda").bfloat16() / features**0.5
    given = x, inner, probe
    _assert_same(round_apart(*given), round_apart_reference(*given))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    [x] = _rows(200, 1024)
    [inner] = _rows(200, 48)
    probe = torch.randn(48, 1024, device="cuda").bfloat16() / 32
    before = [*round_apart(x, inner, probe), *round_rows([x], None)]
    x[17, 900] = value
    x[33] = 0
    after = [*round_apart(x, inner, probe), *round_rows([x], None)]
    others = [at for at in range(200) if at not in (17, 33)]
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was[others], now[others])
    assert not after[1][17].isfinite() and not after[3][17].isfinite()
    assert not after[2][33].any() and 0 < after[3][33] < 1e-30


@pytest.mark.parametrize("shape", [(4096, 14_336), (624, 96), (16, 16)])
def test_codes_turned(shape: tuple[int, int]) -> None:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
    found = turned(codes)
    assert found.is_contiguous() and torch.equal(found, codes.t())


def test_no_rows_and_the_operators_are_such_to_the_compiler() -> None:
    [x, part] = _rows(96, 256, 64)
    [inner] = _rows(96, 56)
    probe, fold = torch.randn(48, 256, device="cuda").bfloat16(), torch.rand(1, 320, device="cuda")
    operators = torch.ops.tunefork
    for operator, given in (
        (operators.round_rows.default, ([x, part], fold)),
        (operators.round_apart.default, (x, inner, probe)),
        (operators.turned.default, (round_rows([x], None)[0],)),
    ):
        torch.library.opcheck(operator, given)
    assert round_rows([x[:0], part[:0]], fold)[0].shape == (0, 320)
    assert round_apart(x[:0], inner[:0], probe)[1].shape == (0, 1)
