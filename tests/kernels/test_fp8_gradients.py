"""All that is made of dy from one reading, over a scale that is known before: the definition.

`operands` are the GPU's tests' too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tunefork.kernels import fp8, fp8_weight
from tunefork.kernels import fp8_gradients as kernel
from tunefork.kernels.compiled import standing_for_gpu
from tunefork.kernels.e4m3 import E4M3, LARGEST, quantize_rows_reference
from tunefork.kernels.fp8_gradients import gradient_codes, gradient_scale
from tunefork.kernels.layout import Layout
from tunefork.kernels.lora_gradients import lora_gradients_reference

SCALE = 0.7


class Operands(NamedTuple):
    """Of `gradient_codes`."""

    dys: list[Tensor]
    u: Tensor
    lora_b: list[Tensor]
    lora_scale: float
    fold: Tensor
    scale: Tensor
    balance: Tensor
    width: int

    def rescaled(self) -> "Operands":
        """With the scale of what dy is now."""
        whole = torch.cat(self.dys, dim=1).float() * self.fold
        length = whole.norm(dim=1, keepdim=True)
        scale = gradient_scale(length, self.lora_b, self.lora_scale, self.fold, self.balance)
        return self._replace(scale=scale)


def operands(
    tokens: int,
    sizes: Sequence[int],
    ranks: Sequence[int],
    *,
    first: int = 0,
    balance: float = 4.0,
    device: str = "cpu",
) -> Operands:
    """dy as columns of one tensor from `first` on, u as the first columns of a wider one."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    wide = draw(tokens, first + sum(sizes)).bfloat16()
    read = draw(tokens, sum(ranks) + 24).bfloat16()
    lora_b = [draw(o, r).bfloat16() / 16 for o, r in zip(sizes, ranks, strict=True)]
    fold = torch.rand(1, sum(sizes), generator=generator, device=device) + 0.01
    return Operands(
        list(torch.split(wide[:, first:], list(sizes), dim=1)),
        read[:, : sum(ranks)],
        lora_b,
        SCALE,
        fold,
        torch.ones(tokens, 1, device=device),
        torch.tensor(balance, device=device),
        -(-3 * sum(ranks) // 64) * 64,
    ).rescaled()


@pytest.mark.parametrize(
    ("sizes", "ranks"), [((576,), (16,)), ((96, 64), (4, 16)), ((64, 16, 16), (1, 32, 8))]
)
def test_codes_are_those_of_quantize_rows_and_gradients_those_of_lora_gradients(
    sizes: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    given = operands(9, sizes, ranks)
    codes, du, db = gradient_codes(*given)
    want_du, want_db = lora_gradients_reference(*given[:4])
    assert torch.equal(du, want_du)
    assert all(torch.equal(a, b) for a, b in zip(db, want_db, strict=True))
    # A column of the largest code has `quantize_rows` take the same scale.
    largest, one = (given.scale * LARGEST).bfloat16(), torch.ones(1, 1)
    want, same = quantize_rows_reference(
        [largest, *given.dys], torch.cat([one, given.fold], 1), du, given.balance, given.width
    )
    assert torch.equal(same, given.scale)
    assert codes.dtype == E4M3 and torch.equal(codes.float(), want[:, 1:].float())


def test_the_scale_is_the_least_power_of_two_that_its_bound_allows() -> None:
    given = operands(64, (96, 32), (4, 2))
    assert torch.equal(given.scale, torch.exp2(torch.log2(given.scale).round()))
    whole = torch.cat(given.dys, dim=1).float() * given.fold
    folds = torch.split(given.fold, [96, 32], dim=1)
    longest = max(
        float((b.float() / f.t()).norm(dim=0).max())
        for b, f in zip(given.lora_b, folds, strict=True)
    )
    factor = max(1.0, longest * SCALE * float(given.balance))
    assert factor > 1
    least = whole.norm(dim=1, keepdim=True) * factor / LARGEST
    assert bool(((least <= given.scale) & (given.scale < 2 * (1 + 2**-6) * least)).all())


@pytest.mark.parametrize("lora_scale", [SCALE, -3.0])
@pytest.mark.parametrize("size", [1.0, 1e-3, 30.0])
def test_dy_along_a_column_of_b_does_not_saturate(size: float, lora_scale: float) -> None:
    """Cauchy-Schwarz's equality: of all rows of a length, these have the largest du."""
    given = operands(40, (96, 64), (4, 2))
    lora_b = [(b * size).bfloat16() for b in given.lora_b]
    rows = torch.rand(40, 1) + 0.5
    given.dys[0].copy_(rows * (lora_b[0][:, 1].float() / given.fold[0, :96].square()))
    given.dys[1].zero_()
    given = given._replace(lora_b=lora_b, lora_scale=lora_scale).rescaled()
    codes, du, _ = gradient_codes(*given)
    exact = torch.cat(given.dys, dim=1).float() * given.fold / given.scale
    assert float(exact.abs().max()) <= LARGEST
    wide = du.float() * given.balance / given.scale
    assert float(wide.abs().max()) <= LARGEST
    if size == 30.0:  # the bound is not a loose one
        assert bool((wide.abs().amax(1) > LARGEST / 2 / (1 + 2**-5)).all())
    # So the columns hold du to the bits that they have: high + low / 16.
    high, low = codes.float()[:, 160:166], codes.float()[:, 166:172]
    assert bool(((high + low / 16 - wide).abs() <= wide.abs() * 2**-8 + 2**-14).all())


def test_what_exceeds_the_scale_saturates() -> None:
    given = operands(5, (96,), (4,))
    codes, du, _ = gradient_codes(*given._replace(scale=given.scale * 2**-20))
    assert bool((codes[:, :96].float().abs()[given.dys[0] != 0] > 300).all())
    assert float(codes.float().abs().max()) == LARGEST
    assert torch.equal(du, gradient_codes(*given)[1])


def test_rows_of_nothing_or_next_to_it_are_finite() -> None:
    given = operands(3, (64,), (4,))
    given.dys[0].mul_(torch.tensor([[0.0], [1e-30], [1e12]]).bfloat16())
    given = given.rescaled()
    codes, du, (db,) = gradient_codes(*given)
    assert bool(given.scale.isfinite().all() and codes.float().isfinite().all())
    assert bool((codes[:2].float() == 0).all() and (codes[2, :64].float() != 0).any())
    assert bool(du.isfinite().all() and db.isfinite().all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen_in_its_row_and_column(value: float) -> None:
    given = operands(8, (64, 32), (4, 2))
    before, before_du, before_db = gradient_codes(*given)
    given.dys[1][3, 5] = value
    given = given.rescaled()
    codes, du, db = gradient_codes(*given)
    others = [row for row in range(8) if row != 3]
    assert not given.scale[3].isfinite() and (codes[3].float() * given.scale[3]).isnan().all()
    assert torch.equal(codes[others].float(), before[others].float())
    assert not du[3, 4:].isfinite().any() and torch.equal(du[others], before_du[others])
    assert not db[1][5].isfinite().any() and torch.equal(db[0], before_db[0])


def test_a_gpu_is_given_the_same_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands(6, (64, 32), (4, 40))
    want = gradient_codes(*given)
    meta = [
        [t.to("meta") for t in each] if isinstance(each, list) else each
        for each in given._replace(
            u=given.u.to("meta"), fold=given.fold.to("meta"), scale=given.scale.to("meta")
        )
    ]

    def not_asked(*_: object) -> None:
        raise AssertionError("the operator was to be asked")

    monkeypatch.setattr(kernel, "gradient_codes_reference", not_asked)
    with standing_for_gpu(lambda *_: None):
        found = gradient_codes(*meta)  # type: ignore[arg-type]
    for ours, theirs in zip([*found[:2], *found[2]], [*want[:2], *want[2]], strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (
            theirs.shape,
            theirs.stride(),
            theirs.dtype,
        )


@pytest.mark.parametrize(("dead", "std"), [(0.0, 0.003), (0.0, 0.3), (0.01, 0.01), (0.1, 0.01)])
def test_the_bound_costs_the_input_gradient_little(dead: float, std: float) -> None:
    """Large deltas and rows of next to nothing raise all scales; dx is hardly further off than over
    scales of the largest numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size, features, rank = 1024, 512, 16
    layout = Layout("e4m5", "fp8", (size, size), (rank, rank), 2.0)
    weights = [draw(size, features) * 0.02 for _ in range(2)]
    for weight in weights:
        weight[: int(dead * size)] *= 1e-3
    kept = fp8_weight.fp8_weights([weight.bfloat16() for weight in weights], layout, features)
    rows = fp8_weight.rows_of(layout, kept, features)
    a = (draw(2 * rank, features) * features**-0.5).bfloat16()
    lora_b = [(draw(size, rank) * std).bfloat16() for _ in range(2)]
    dys = [(draw(64, size) * 1e-4).bfloat16() for _ in range(2)]
    beside, balance = fp8.a_beside(layout, a)
    assert balance is not None
    length = (torch.cat(dys, dim=1).float() * rows.scale_1o).norm(dim=1, keepdim=True)
    of_delta = (lora_b, layout.scale, rows.scale_1o)
    scale = gradient_scale(length, *of_delta, balance)
    u = draw(64, 2 * rank).bfloat16()
    codes, du, _ = gradient_codes(dys, u, *of_delta, scale, balance, layout.back_width)
    found = fp8.turned_product(codes, scale, rows, beside).double()
    before = fp8.input_gradient(dys, layout, kept, a, du, features).double()
    dense = [fp8_weight.dense(layout, kept, features, torch.float32, at, at + 1) for at in (0, 1)]
    exact = sum(
        dy.double() @ (weight.double() + layout.scale * b.double() @ own.double())
        for dy, weight, b, own in zip(dys, dense, lora_b, a.split(rank), strict=True)
    )
    errors = [float((dx - exact).norm() / exact.norm()) for dx in (found, before)]
    assert errors[0] < 1.2 * errors[1] < 0.06
