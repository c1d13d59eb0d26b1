"""Drawn tokens: the right proportions, and the same whatever else is drawn."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tunefork.kernels import draw as module
from tunefork.kernels.draw import draw, draw_by_sorting, draw_reference


def _drawn(logits_rv: Tensor, told: Sequence[tuple[float, ...]]) -> list[int]:
    """The tokens of the rows in `told`, in its order."""
    tokens_r = logits_rv.argmax(-1)
    draw(logits_rv, tokens_r, torch.tensor(told, dtype=torch.float64))
    return [int(tokens_r[int(row)]) for row, *_ in told]


def _shares(logits_v: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(V,) of numbers that lie evenly between 0 and 1."""
    number = 1000
    told = [(row, temperature, top_k, top_p, (row + 0.5) / number) for row in range(number)]
    counts = Counter(_drawn(logits_v.expand(number, -1), told))
    return torch.tensor([counts[token] / number for token in range(len(logits_v))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_shares_are_the_softmaxs(temperature: float, dtype: torch.dtype) -> None:
    """To within one number of each token, for they lie evenly."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).mul(2).to(dtype)
    expected = (logits.float() / temperature).softmax(-1)
    assert (_shares(logits, temperature, 0, 1.0) - expected).abs().max() < 1.1 / 1000


@pytest.mark.parametrize("candidates", [2, 1024])
def test_top_k_and_top_p_keep_the_fewest_likeliest(
    candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By sorting; whether or not those first looked at suffice."""
    monkeypatch.setattr(module, "_CANDIDATES", candidates)
    dice = random.Random(0)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    order = logits.argsort(descending=True)
    for _ in range(12):
        top_k, top_p = dice.choice((0, 2, 5, 20, 40, 90)), dice.choice((0.1, 0.5, 0.9, 1.0))
        chances = logits.softmax(-1)[order]
        chances[top_k or 40 :] = 0
        chances /= chances.sum()
        chances[chances.cumsum(0) - chances >= top_p] = 0
        expected = torch.empty(40).index_copy(0, order, chances / chances.sum())
        assert (_shares(logits, 1.0, top_k, top_p) - expected).abs().max() < 1.1 / 1000


def test_tokens_as_likely_as_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([2.0, 1.0, 2.0, 0.0, 1.0, -0.0])
    assert set(_shares(logits, 1.0, 1, 1.0).nonzero().flatten().tolist()) == {0, 2}
    assert set(_shares(logits, 1.0, 3, 1.0).nonzero().flatten().tolist()) == {0, 1, 2, 4}
    assert set(_shares(logits, 1.0, 5, 1.0).nonzero().flatten().tolist()) == set(range(6))
    assert set(_shares(logits, 1.0, 0, 1e-9).nonzero().flatten().tolist()) == {0, 2}


def test_a_row_is_its_own_among_any_others() -> None:
    """Alone, among others, in another order, and where other rows are not finite."""
    dice, made = random.Random(0), torch.Generator().manual_seed(2)
    logits = torch.randn(16, 3001, generator=made).bfloat16()
    told = [
        (row, dice.choice((0.5, 1.0)), dice.choice((0, 50)), dice.choice((1.0, 0.9)), dice.random())
        for row in range(16)
    ]
    whole = _drawn(logits, told)
    assert [_drawn(logits[row : row + 1], [(0, *told[row][1:])])[0] for row in range(16)] == whole
    assert _drawn(logits, told[::-1]) == whole[::-1]
    logits[::2] = torch.nan
    assert _drawn(logits, told[1::2]) == whole[1::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [3, 97, 256, 3001])
def test_sorting_draws_what_is_defined(
    vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: peaked logits and flat ones, all but one of them ruled out, and no numbers."""
    monkeypatch.setattr("tunefork.kernels.draw._TOGETHER", 5 * vocabulary)
    dice, made = random.Random(0), torch.Generator().manual_seed(3)
    sharpness = torch.linspace(0.0, 6.0, 40)[:, None]
    logits = (torch.randn(40, vocabulary, generator=made) * sharpness).to(dtype)
    logits[5, 1:], logits[9] = -torch.inf, torch.nan
    for is_limited in (True, True, True, False):
        told = [
            (
                row,
                dice.choice((1e-4, 0.5, 1.0, 2.0)),
                dice.choice((0, 0, 2, 50, 10**6) if is_limited else (0,)),
                dice.choice((1.0, 1.0, 0.9, 0.99, 1e-9) if is_limited else (1.0,)),
                dice.choice((0.0, dice.random(), dice.random(), 1.0 - 2.0**-53)),
            )
            for row in dice.sample(range(40), 36)
        ]
        expected = logits.float().argmax(-1)
        expected[9] = -1
        found = expected.clone()
        draw_reference(logits, expected, torch.tensor(told, dtype=torch.float64))
        draw_by_sorting(logits, found, torch.tensor(told, dtype=torch.float64))
        assert torch.equal(found, expected)
        told.sort(key=lambda one: one[2] > 0 or one[3] < 1.0)  # as they come from `draw_rows`
        again = logits.float().argmax(-1)
        again[9] = -1
        draw_by_sorting(logits, again, torch.tensor(told, dtype=torch.float64))
        assert torch.equal(again, expected)


def test_rows_that_are_not_told_or_have_no_token_stay() -> None:
    logits, tokens = torch.zeros(3, 9), torch.tensor([4, -1, 4])
    draw(logits, tokens, torch.tensor([[1, 1, 0, 1, 0.99], [2, 1, 0, 1, 0.99]]).double())
    assert tokens.tolist() == [4, -1, 8]


@pytest.mark.parametrize("temperature", [1e-4, 1.0, 2.0])
def test_the_ends_are_tokens_with_a_chance(temperature: float) -> None:
    """A number near 1 never falls on what is ruled out or too unlikely, 0 neither."""
    logits = torch.tensor([[-torch.inf, -1e9, 5.0, 5.0, -1e9, -torch.inf]])
    assert _drawn(logits, [(0, temperature, 0, 1.0, 0.0)]) == [2]
    assert _drawn(logits, [(0, temperature, 0, 1.0, 1.0 - 2.0**-53)]) == [3]
