"""Choosing tokens: greedy, drawn in the right proportions, and one row's alone."""

import random
from collections import Counter

import pytest
import torch

from tunefork.kernels import draw as module
from tunefork.serve.engines.choose import BAD, Choice, choose, greedy, log_probabilities


def _draws(logits: torch.Tensor, number: int = 4000, **options: float) -> Counter[int]:
    chosen = random.Random(0)
    choices = [Choice(uniform=chosen.random(), **options) for _ in range(number)]  # type: ignore[arg-type]
    return Counter(choose(logits.expand(number, -1), choices).tolist())


def _drawn(logits: torch.Tensor, **options: float) -> set[int]:
    """What ever is: at a share of 0.1 or more, 400 draws miss nothing in 10**18 tries."""
    return set(_draws(logits, 400, **options))


def test_rows_without_finite_logits_are_bad_and_others_are_not() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [2.0, float("inf")]])
    assert greedy(logits).tolist() == [1, BAD, BAD]
    hot = Choice(temperature=1.0, uniform=0.5)
    assert choose(logits, [hot, hot, Choice()]).tolist() == [1, BAD, BAD]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    expected = (logits / temperature).softmax(-1)[0]
    drawn = _draws(logits, temperature=temperature)
    for token in range(4):
        assert abs(drawn[token] / 4000 - float(expected[token])) < 0.03


@pytest.mark.parametrize("candidates", [2, 3, 1024])
def test_top_k_and_top_p_leave_the_likeliest(
    candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not they are among the first candidates that are looked at."""
    monkeypatch.setattr(module, "_CANDIDATES", candidates)
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    assert _drawn(logits, temperature=1.0, top_k=2) == {1, 2}
    assert _drawn(logits, temperature=1.0, top_k=1) == {1}
    assert _drawn(logits, temperature=1.0, top_p=0.39) == {1}
    assert _drawn(logits, temperature=1.0, top_p=0.5) == {1, 2}
    assert _drawn(logits, temperature=1.0, top_p=0.75) == {1, 2, 3}
    assert _drawn(logits, temperature=1.0, top_p=1.0) == {0, 1, 2, 3}
    # Of the two that top-k leaves, the first has 4 / 7.
    assert _drawn(logits, temperature=1.0, top_k=2, top_p=0.55) == {1}
    drawn = _draws(logits, temperature=1.0, top_k=2)
    assert abs(drawn[1] / 4000 - 4 / 7) < 0.03


def test_bias_penalties_and_grammar_change_only_their_own_row() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 4)
    allowed = torch.tensor([True, False, False])
    rows = [
        Choice(),
        Choice(changes=((2, -5.0),)),
        Choice(changes=((0, 50.0), (0, 50.0))),
        Choice(allowed=allowed),
    ]
    assert choose(logits, rows).tolist() == [2, 1, 0, 0]
    hot = [
        Choice(temperature=one.temperature or 1.0, changes=one.changes, allowed=one.allowed)
        for one in rows
    ]
    assert choose(logits, hot).tolist()[3] == 0


def test_a_uniform_number_near_one_never_falls_on_what_is_ruled_out() -> None:
    logits = torch.tensor([[0.0, 0.0, float("-inf"), float("-inf")]])
    last = Choice(temperature=1.0, uniform=1.0 - 2**-53)
    assert choose(logits, [last]).tolist() == [1]


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.randn(2, 9, dtype=torch.bfloat16)
    expected = logits.float().log_softmax(-1)
    found = log_probabilities(logits, [3, 5], 2)
    for row, (token, (own, top)) in enumerate(zip((3, 5), found, strict=True)):
        assert own == pytest.approx(float(expected[row, token]), abs=1e-5)
        values, ids = expected[row].topk(2)
        assert [index for index, _ in top] == ids.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-5)
