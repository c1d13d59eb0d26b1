"""All that is made of dy from one reading, where its rows' largest numbers are known before: the
definition.

`operands` are the GPU's tests' too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tunefork.kernels import int8_gradients as kernel
from tunefork.kernels.compiled import standing_for_gpu
from tunefork.kernels.int8_gradients import gradient_codes
from tunefork.kernels.int8_range import LARGEST, LEAST
from tunefork.kernels.int8_rows import round_rows_reference
from tunefork.kernels.lora_gradients import lora_gradients_reference

SCALE = 0.7


class Operands(NamedTuple):
    """Of `gradient_codes`."""

    dys: list[Tensor]
    u: Tensor
    lora_b: list[Tensor]
    lora_scale: float
    fold: Tensor
    most: Tensor

    def remeasured(self) -> "Operands":
        """With the largest magnitudes of what dy is now."""
        whole = torch.cat(self.dys, dim=1).float() * self.fold
        return self._replace(most=whole.abs().amax(1, keepdim=True))


def operands(
    tokens: int, sizes: Sequence[int], ranks: Sequence[int], *, first: int = 0, device: str = "cpu"
) -> Operands:
    """dy as columns of one tensor from `first` on, u as the first columns of a wider one."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    wide = draw(tokens, first + sum(sizes)).bfloat16()
    read = draw(tokens, sum(ranks) + 24).bfloat16()
    return Operands(
        list(torch.split(wide[:, first:], list(sizes), dim=1)),
        read[:, : sum(ranks)],
        [draw(o, r).bfloat16() / 16 for o, r in zip(sizes, ranks, strict=True)],
        SCALE,
        torch.rand(1, sum(sizes), generator=generator, device=device) + 0.01,
        torch.ones(tokens, 1, device=device),
    ).remeasured()


@pytest.mark.parametrize(
    ("sizes", "ranks"), [((576,), (16,)), ((96, 64), (4, 16)), ((64, 16, 16), (1, 32, 8))]
)
def test_codes_are_those_of_round_rows_and_gradients_those_of_lora_gradients(
    sizes: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    given = operands(9, sizes, ranks)
    *found, db = gradient_codes(*given)
    want_du, want_db = lora_gradients_reference(*given[:4])
    wanted = [*round_rows_reference(given.dys, given.fold), want_du, *want_db]
    for ours, theirs in zip([*found, *db], wanted, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_the_scale_is_that_of_the_given_magnitude() -> None:
    given = operands(9, (96, 64), (4, 16))
    codes, scale, _, _ = gradient_codes(*given._replace(most=given.most * 4))
    torch.testing.assert_close(scale * LARGEST, given.most * 4, rtol=2**-22, atol=0)
    exact = torch.cat(given.dys, dim=1).double() * given.fold.double() / scale.double()
    assert bool(((codes.double() - exact).abs() <= 0.5 + 1e-4).all())
    assert 31 <= int(codes.max()) <= 32


def test_the_largest_number_of_a_row_is_127_whatever_it_is() -> None:
    """Roundings take it nowhere near 127.5, so the kernel, which has no limit, needs none."""
    given = operands(4096, (48,), (4,))
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-90, 120, (4096, 1), generator=generator)
    given.dys[0].mul_(torch.exp2(exponents.float()).bfloat16())
    given = given.remeasured()
    codes, scale, _, _ = gradient_codes(*given)
    assert torch.equal(codes.int().abs().amax(1), torch.full((4096,), LARGEST, dtype=torch.int32))
    exact = given.dys[0].float() * given.fold * scale.reciprocal()
    assert float(exact.abs().max()) <= LARGEST * (1 + 2**-21)


def test_rows_of_nothing_or_next_to_it_are_finite() -> None:
    given = operands(3, (64,), (4,))
    given.dys[0].mul_(torch.tensor([[0.0], [LEAST / 1e3], [1e12]]).bfloat16())
    codes, scale, du, (db,) = gradient_codes(*given.remeasured())
    assert all(bool(x.isfinite().all()) for x in (scale, du, db))
    assert not codes[0].any() and int(codes[1].abs().max()) <= 1 and codes[2].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen_in_its_row_and_column(value: float) -> None:
    given = operands(8, (64, 32), (4, 2))
    before = gradient_codes(*given)
    given.dys[1][3, 5] = value
    codes, scale, du, db = gradient_codes(*given.remeasured())
    others = [row for row in range(8) if row != 3]
    assert not scale[3].isfinite().any() and not du[3, 4:].isfinite().any()
    assert not db[1][5].isfinite().any() and torch.equal(db[0], before[3][0])
    for ours, theirs in zip((codes, scale, du), before[:3], strict=True):
        assert torch.equal(ours[others], theirs[others])


def test_a_gpu_is_given_the_same_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands(6, (64, 32), (4, 40))
    want = gradient_codes(*given)
    dys, lora_b = ([x.to("meta") for x in each] for each in (given.dys, given.lora_b))
    u, fold, most = (x.to("meta") for x in (given.u, given.fold, given.most))

    def not_asked(*_: object) -> None:
        raise AssertionError("the operator was to be asked")

    monkeypatch.setattr(kernel, "gradient_codes_reference", not_asked)
    with standing_for_gpu(lambda *_: None):
        found = gradient_codes(dys, u, lora_b, SCALE, fold, most)
    for ours, theirs in zip([*found[:3], *found[3]], [*want[:3], *want[3]], strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (
            theirs.shape,
            theirs.stride(),
            theirs.dtype,
        )
