"""Metrics by hand, intervals by simulation."""

import math

import numpy as np
import pytest

from tunefork.evaluate.statistics import METRICS, Columns, estimate, paired_difference


def _labelled(gold: list[int], predicted: list[int]) -> Columns:
    return {"gold": np.array(gold), "predicted": np.array(predicted)}


def test_point_values_by_hand() -> None:
    columns = _labelled([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0])
    columns |= {
        "loss_sum": np.array([2.0, 4.0, 0, 0, 0, 0]),
        "tokens": np.array([1, 5, 1, 1, 1, 1]),
    }
    assert estimate("accuracy", [columns], samples=200).value == pytest.approx(4 / 6)
    # F1 by label: 0: 2*1/(2*1+1+1) = 1/2; 1: 2*2/(2*2+1+0) = 4/5; 2: 2*1/(2*1+0+1) = 2/3
    macro = (1 / 2 + 4 / 5 + 2 / 3) / 3
    assert estimate("macro_f1", [columns], samples=200).value == pytest.approx(macro)
    assert estimate("loss", [columns], samples=200).value == pytest.approx(6 / 10)
    assert estimate("perplexity", [columns], samples=200).value == pytest.approx(math.exp(0.6))


def test_macro_f1_of_many_resamples_is_that_of_each() -> None:
    rng = np.random.default_rng(0)
    gold, predicted = rng.integers(0, 5, (20, 12)), rng.integers(0, 5, (20, 12))
    compute = METRICS["macro_f1"].compute
    alone = [compute([p[None], g[None]])[0] for p, g in zip(predicted, gold, strict=True)]
    np.testing.assert_allclose(compute([predicted, gold]), alone)


def test_the_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = estimate("rouge_l", [{"rouge_l": values}], samples=4000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)
    assert found.low < found.value < found.high


def test_pairing_cancels_what_is_hard_for_both() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(scale=1.0, size=300)
    a = [{"rouge_l": hard + 0.05 + rng.normal(scale=0.01, size=300)}]
    b = [{"rouge_l": hard + rng.normal(scale=0.01, size=300)}]
    found = paired_difference("rouge_l", a, b, samples=1000)
    alone = estimate("rouge_l", a, samples=1000)
    assert 0.04 < found.low < found.value < found.high < 0.06
    assert found.share_above == 1.0
    assert (alone.high - alone.low) > 10 * (found.high - found.low)
    back = paired_difference("rouge_l", b, a, samples=1000)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_no_difference_has_an_even_share() -> None:
    run = [_labelled([0, 1, 1], [0, 1, 0])]
    found = paired_difference("accuracy", run, run, samples=200)
    assert (found.value, found.low, found.high, found.share_above) == (0, 0, 0, 0.5)


def test_different_examples_are_refused() -> None:
    a, b = [{"rouge_l": np.ones(3)}], [{"rouge_l": np.ones(4)}]
    with pytest.raises(ValueError, match="different examples"):
        paired_difference("rouge_l", a, b, samples=200)


@pytest.mark.parametrize("num_seeds", [1, 3, 5])
def test_coverage(num_seeds: int) -> None:
    """The truth lies in the interval about 95 times of 100, with noise of examples and of seeds.

    One seed's interval is about examples only, so there the seeds' noise is left out.
    """
    rng = np.random.default_rng(3)
    covered, trials = 0, 200
    seed_noise = 0.0 if num_seeds == 1 else 0.05
    for trial in range(trials):
        common = rng.normal(scale=0.5, size=100)
        sides = []
        for mean in (0.3, 0.0):
            shifts = mean + rng.normal(scale=seed_noise, size=num_seeds)
            sides.append(
                [{"rouge_l": common + s + rng.normal(scale=0.5, size=100)} for s in shifts]
            )
        found = paired_difference("rouge_l", sides[0], sides[1], samples=200, seed=trial)
        covered += found.low <= 0.3 <= found.high
    # A binomial(200, 0.95) falls below 180 once in 400; wider intervals than 95 % are allowed.
    assert covered >= 180


def test_seeds_that_disagree_widen_the_interval_and_the_share() -> None:
    rng = np.random.default_rng(4)
    noise = rng.normal(scale=0.01, size=200)
    steady = [{"rouge_l": noise + 0.1} for _ in range(3)]
    wild = [{"rouge_l": noise + 0.1 + shift} for shift in (-0.2, 0.0, 0.2)]
    zero = [{"rouge_l": noise} for _ in range(3)]
    sure = paired_difference("rouge_l", steady, zero, samples=400)
    unsure = paired_difference("rouge_l", wild, zero, samples=400)
    assert sure.low > 0 and sure.share_above > 0.99
    assert unsure.low < 0 and 0.5 < unsure.share_above < 0.9
    assert unsure.value == pytest.approx(sure.value)


def test_many_seeds_get_no_less_than_their_t() -> None:
    """12 seeds and examples all alike: the interval is 2.201 standard errors, or a little more."""
    figures = np.linspace(-1, 1, 12)
    runs = [{"rouge_l": np.full(50, figure)} for figure in figures]
    found = estimate("rouge_l", runs, samples=200)
    standard_error = figures.std(ddof=1) / math.sqrt(12)
    assert 2.201 * standard_error <= found.high - found.value < 2.3 * standard_error


def test_macro_f1_of_many_labels_is_covered() -> None:
    """Left as they are, the resamples' interval holds the truth in half the trials."""
    rng = np.random.default_rng(5)
    share = 1 / np.arange(1, 78) ** 0.7
    share /= share.sum()
    right = np.clip(0.7 + 0.2 * np.cos(np.arange(77)), 0.05, 0.99)

    def draw(size: int) -> Columns:
        gold, other = rng.choice(77, (2, size), p=share)
        return {
            "gold": gold,
            "predicted": np.where(rng.random(size) < right[gold], gold, other),
        }

    truth = estimate("macro_f1", [draw(400_000)], samples=1).value
    covered = 0
    for _ in range(50):
        found = estimate("macro_f1", [draw(600)], samples=200)
        assert found.low < found.value < found.high <= 1
        covered += found.low <= truth <= found.high
    assert covered >= 40


def test_macro_f1_without_a_mistake_is_one() -> None:
    found = estimate("macro_f1", [_labelled([0, 1, 2, 2], [0, 1, 2, 2])], samples=200)
    assert (found.value, found.low, found.high) == (1, 1, 1)
