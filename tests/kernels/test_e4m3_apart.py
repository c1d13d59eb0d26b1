"""Rows in e4m3 with some directions taken out, over a scale that is known before: the definition.

`operands` and `same_but_for_neighbours` are the GPU's tests' too.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunefork.kernels.e4m3 import LARGEST, quantize_rows
from tunefork.kernels.e4m3_apart import apart_scale, quantize_apart

_STEP = 2.0**-9
"""Between codes under 2**-6."""


class Operands(NamedTuple):
    """Of `quantize_apart`, but for the scale."""

    x: Tensor
    inner: Tensor
    apart: int
    probe: Tensor
    balance: Tensor
    width: int

    def scale(self) -> Tensor:
        return apart_scale(self.x, self.inner, self.balance)

    def codes(self) -> Tensor:
        x, inner, apart, probe, balance, width = self
        return quantize_apart(x, inner, apart, probe, balance, self.scale(), width)

    def exact(self) -> Tensor:
        """x - z V"""
        return self.x.double() - self.inner[:, -self.apart :].double() @ self.probe.double()


def operands(
    tokens: int, size: int, rank: int, apart: int = 64, *, rest: float = 0.3, device: str = "cpu"
) -> Operands:
    """Rows along `apart` directions, or as many as there can be, and `rest` times as much of
    others; `inner` is part of a wider matrix."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).to(device)

    directions = torch.linalg.qr(draw(size, min(apart, size))).Q.t()
    probe = F.pad(directions, (0, 0, 0, apart - len(directions))).bfloat16()
    along = draw(tokens, apart, apart**-0.5) @ probe.float()
    x = (along + draw(tokens, size, rest * size**-0.5)).bfloat16()
    readers = torch.cat([draw(rank, size, size**-0.5), probe.float(), draw(16, size)]).bfloat16()
    inner = (x @ readers.t())[:, : rank + apart]
    width = -(-3 * (rank + apart) // 64) * 64
    return Operands(x, inner, apart, probe, torch.tensor(4.0, device=device), width)


def same_but_for_neighbours(codes: Tensor, want: Tensor, first_low: int) -> None:
    """Sums in another order move what lies between two codes to the other one: by 2**-20 of x or so
    where codes are an eighth of x - z V apart. A low part then goes to the other end of its range,
    half a step of 32 times 16 either way."""
    found, wanted = codes.float(), want.float()
    assert torch.equal(found.isnan(), wanted.isnan())
    difference = (found - wanted).nan_to_num().abs()
    assert (difference > 0).float().mean() < 1e-3
    step = wanted.nan_to_num().abs() / 8 + _STEP
    assert bool((difference <= step)[:, :first_low].all()) and float(difference.max()) <= 512.0


@pytest.mark.parametrize(
    ("tokens", "size", "rank", "apart"), [(33, 576, 16, 64), (1, 16, 0, 64), (7, 4096, 3, 16)]
)
def test_a_row_is_off_by_e4m3s_rounding(tokens: int, size: int, rank: int, apart: int) -> None:
    given = operands(tokens, size, rank, apart)
    codes, scale, exact = given.codes(), given.scale(), given.exact()
    assert codes.shape == (tokens, size + given.width)
    off = (codes[:, :size].double() * scale - exact).abs()
    # Half a step of three bits, or of those under 2**-6; and fp32's sums.
    allowed = exact.abs() / 16 + scale * _STEP / 2 + 2**-20 * given.x.double().norm(dim=1)[:, None]
    assert bool((off <= allowed).all())
    if size > apart:  # else all of x is taken out
        assert float(off.norm()) < 0.028 * float(exact.norm())


@pytest.mark.parametrize("rank", [0, 1, 16, 192])
def test_the_deltas_columns_are_those_of_quantize_rows(rank: int) -> None:
    given = operands(9, 96, rank)
    scale = given.scale()
    # A column of the largest code has `quantize_rows` take the same scale.
    largest = (scale * LARGEST).bfloat16()
    want, same = quantize_rows([largest], None, given.inner, given.balance, given.width)
    assert torch.equal(same, scale)
    assert torch.equal(given.codes()[:, 96:].float(), want[:, 1:].float())


def test_the_scale_is_a_power_of_two_that_bounds_the_length_and_the_delta() -> None:
    given = operands(64, 96, 4)
    scale = given.scale()
    assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))
    largest = (given.inner.float() * given.balance).abs().amax(1, keepdim=True)
    bound = torch.maximum(given.x.float().norm(dim=1, keepdim=True), largest) / LARGEST
    assert bool(((bound <= scale) & (scale < 2 * bound)).all())


def test_one_huge_number_is_within_range_and_what_it_takes_from_the_others_is_bounded() -> None:
    size = 4096
    given = operands(4, size, 4)
    given.x[:, 7] = 3000.0
    given = given._replace(inner=torch.zeros_like(given.inner))  # the number is in none of V
    scale = given.scale()
    decoded = given.codes()[:, :size].double() * scale
    off = decoded - given.x.double()
    assert bool((off[:, 7].abs() <= 3000.0 / 16).all())
    off[:, 7] = 0.0
    length = given.x.double().norm(dim=1)
    # The others are under 2**-6 of the scale, off by 2**-10 of it.
    assert float(given.x[:, 8:].abs().max()) < float(scale.max()) * 2**-6
    assert bool((off.norm(dim=1) <= size**0.5 * 2**-10 / 224 * length).all())
    assert bool((off.norm(dim=1) > 0).all())


def test_where_little_is_left_of_x_it_keeps_e4m3s_precision_down_to_a_fiftieth() -> None:
    for rest, most in ((0.3, 0.028), (0.05, 0.028), (0.02, 0.028), (0.002, 0.2)):
        given = operands(64, 4096, 4, rest=rest)
        exact = given.exact()
        off = given.codes()[:, :4096].double() * given.scale() - exact
        assert float(off.norm() / exact.norm()) < most


def test_a_bit_of_one_number_of_x_moves_no_other_code() -> None:
    given = operands(16, 96, 4)
    moved = given.x.clone()
    moved[:, 5] *= 1 + 2**-7
    before, after = given.codes(), given._replace(x=moved).codes()
    same = given._replace(x=moved).scale() == given.scale()
    assert int(same.sum()) >= 15  # rows whose length crossed no power of two
    others = [column for column in range(before.shape[1]) if column != 5]
    equal = (before.float() == after.float())[:, others]
    assert bool(equal[same[:, 0]].all())


@pytest.mark.parametrize("spoilt", ["x", "inner"])
def test_a_row_that_is_not_finite_leaves_the_others_alone_and_is_seen(spoilt: str) -> None:
    given = operands(8, 64, 4)
    before = given.codes()
    for value in (torch.nan, torch.inf):
        tensor = getattr(given, spoilt)
        kept, tensor[3, 2] = tensor[3, 2].clone(), value
        after = given.codes()
        assert (after[3].float() * given.scale()[3]).isnan().any()
        others = [row for row in range(8) if row != 3]
        assert torch.equal(after.float()[others], before.float()[others])
        tensor[3, 2] = kept


def test_rows_of_nothing_or_next_to_it_are_finite() -> None:
    given = operands(3, 64, 4)
    x = given.x * torch.tensor([[0.0], [1e-30], [1e12]]).bfloat16()
    inner = given.inner * torch.tensor([[0.0], [1e-30], [1e12]]).bfloat16()
    given = given._replace(x=x, inner=inner)
    codes, scale = given.codes().float(), given.scale()
    assert bool(codes.isfinite().all() and scale.isfinite().all())
    assert bool((codes[:2] == 0).all()) and bool((codes[2] != 0).any())
