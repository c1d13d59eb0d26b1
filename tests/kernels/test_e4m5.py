"""Ten bits a weight: what is kept, and what is drawn of it."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels.adamw import mix
from tunefork.kernels.e4m5 import DrawnRows, drawn, e4m5_dense, e4m5_weight

GRID = torch.cat(
    [torch.arange(32) * 2.0**-11]
    + [(1 + torch.arange(32) / 32) * 2.0**power for power in range(-6, 9)]
)
"""Magnitudes of e4m5, the numbers above 448 too."""
GRID = GRID[GRID <= 448]


def _rows(weights: list[Tensor], seed: int = 0) -> DrawnRows:
    numbers = torch.arange(4, dtype=torch.int32) + 10 * seed
    return DrawnRows(*e4m5_weight(weights), mix(numbers))


def _exact(magnitudes: Tensor, signs: tuple[float, ...] = (1.0, -1.0)) -> Tensor:
    """(O, 64): the magnitudes with each sign, in rows whose largest is 448."""
    values = torch.cat([sign * magnitudes for sign in signs])
    values = torch.cat([values, values.new_zeros(-len(values) % 63)]).view(-1, 63)
    return torch.cat([values.new_full((len(values), 1), 448.0), values], dim=1)


def test_a_number_of_the_format_is_kept_as_it_is() -> None:
    weight = _exact(GRID)
    high, low, scales = e4m5_weight([weight])
    assert high.shape == weight.shape and low.shape == (len(weight), 16)
    assert torch.equal(scales, torch.ones_like(scales))
    assert torch.equal(e4m5_dense(high, low, scales[0], torch.float32), weight)


def test_a_number_between_two_goes_to_the_nearer_one() -> None:
    below, above = GRID[:-1], GRID[1:]
    for share in (0.1, 0.45, 0.55, 0.9):
        weight = _exact(below + share * (above - below))
        found = e4m5_weight([weight])
        dense = e4m5_dense(found[0], found[1], found[2][0], torch.float32)
        assert torch.equal(dense, _exact(above if share > 0.5 else below))


def test_a_draw_is_one_of_the_two_codes_beside_it_and_its_mean_is_the_weight() -> None:
    weight = _exact(GRID)
    high, low, _ = e4m5_weight([weight])
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    place = torch.searchsorted(values, weight.abs(), right=True) - 1
    under, over = values[place], values[(place + 1).clamp(max=126)]
    number, total = 4000, torch.zeros_like(weight)
    for seed in mix(torch.arange(number, dtype=torch.int32)):
        codes = drawn(high, low, seed, torch.tensor(0)).view(torch.float8_e4m3fn).float()
        is_beside = (codes.abs() == under) | ((codes.abs() == over) & (under != weight.abs()))
        assert bool(is_beside.all()) and bool((codes * weight >= 0).all())
        total += codes
    # The share of draws that go up is off by five of its standard errors at most.
    spread = (over - under) * 0.5 / number**0.5
    assert bool(((total / number - weight).abs() <= 5 * spread).all())


def test_four_turns_of_one_seed_have_the_weight_for_their_mean() -> None:
    """Not nearly: of a weight with k quarters k of the four draws go up."""
    weight = _exact(GRID)
    high, low, _ = e4m5_weight([weight])
    seed = mix(torch.tensor(7, dtype=torch.int32))
    codes = [
        drawn(high, low, seed, torch.tensor(turn, dtype=torch.int32)).view(torch.float8_e4m3fn)
        for turn in range(4)
    ]
    assert torch.equal(torch.stack([code.float() for code in codes]).mean(0), weight)
    assert len({tuple(code.float().flatten().tolist()) for code in codes}) == 4


def test_both_passes_draw_apart_and_a_seed_draws_the_same_again() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 96, generator=generator).bfloat16() for rows in (64, 32)]
    rows = _rows(weights)
    straight = rows.codes().float()
    turned = rows.codes_turned().float().t()
    assert torch.equal(_rows(weights).codes().float(), straight)
    assert 0.1 < float((straight != turned).float().mean()) < 0.5
    assert not torch.equal(_rows(weights, seed=1).codes().float(), straight)
    whole = torch.cat(weights).float()
    for codes in (straight, turned):
        error = (codes * rows.scale_1o.t() - whole).norm() / whole.norm()
        assert 0.02 < float(error) < 0.05


def test_what_stands_beside_lies_to_the_right() -> None:
    rows = _rows([torch.randn(32, 64)])
    right = torch.randint(0, 100, (32, 16), dtype=torch.uint8)
    below = torch.randint(0, 100, (64, 16), dtype=torch.uint8)
    wide, turned = rows.codes(right), rows.codes_turned(below)
    assert torch.equal(wide[:, 64:].view(torch.uint8), right)
    assert torch.equal(wide[:, :64].float(), rows.codes().float())
    assert torch.equal(turned[:, 32:].view(torch.uint8), below)


@pytest.mark.parametrize("kind", ["zeros", "outlier"])
def test_rows_of_any_size_are_kept(kind: str) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    weight[2] = 0.0 if kind == "zeros" else weight[2] * 1e4
    high, low, scales = e4m5_weight([weight])
    dense = e4m5_dense(high, low, scales[0], torch.float32)
    assert bool(dense.isfinite().all())
    for found, row in zip(dense, weight, strict=True):
        # A row of next to nothing has the scale of one 256 times as large.
        most = 0.01 * float(row.norm()) + 32**0.5 * 2.0**-12 * float(scales[0].min())
        assert float((found - row).norm()) <= most
