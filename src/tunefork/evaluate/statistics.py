"""Intervals for every figure, and paired differences between methods.

An evaluation leaves *columns*, one value an example. A metric is a function of them, and the
bootstrap (Efron and Tibshirani 1993, chapters 13 and 16) resamples the examples to see how much the
metric would move with other examples from the same source; `intervals.py` makes 95 % intervals of
that, wide enough for few examples. Two methods are compared on the *same* resampled examples, so
that what is hard for both cancels out: that is the pairing.

**Several seeds.** With several runs a side, each a training seed, the figure is the mean over runs
and its error has two parts, added as variances: the examples' (all runs on one resample) and, from
three runs on, the seeds'. Resampling 3 to 5 seeds is known to give intervals that are too short, so
the seeds' part is taken from theory (`intervals.py`): of the runs' figures, or of their
differences, where the runs of both sides have the same seeds. This errs on the wide side, because
the runs' variance also holds some of the examples' noise. With one run or two there is no such
part, and the verdict says that the variance of training is unmeasured.

**Shares, paired.** Two methods differ on the few examples that one gets right and the other wrong.
Where all of 4 go one way, a bootstrap finds a difference, though a coin would do so one time in 8.
One example won by each side is therefore added, which agrees with McNemar's exact test (Bonett and
Price 2012, https://doi.org/10.3102/1076998611411915).

**How often it is wrong.** Of 100 comparisons of equals, so many find a difference at 5 %, in 2,000
simulations each; in brackets, by percentiles left as they are. Losses are log-normal (sigma 1), and
so is what each side makes of them (0.3); accuracies differ on 40 % of the examples; where a
difference is skewed, a few large ones make up for many small ones (log-normal, sigma 0.5 and 1):

    examples     losses     accuracies    skewed 0.5    skewed 1
    10           3 (13)     0  (7)        7 (13)        15 (20)
    30           3  (9)     3  (5)        6  (7)        11 (12)
    100          4  (8)     4  (5)        5  (7)         8  (9)

So few examples do not show their skew. Below `FEWEST_EXAMPLES` nothing counts as detected, and the
verdict warns below 30.

**Perplexity** is the loss's exponential, and so is its interval: on its own scale, that of few
examples reached down to 1 beside a loss of 7.5 at least.

**Macro-F1 is biased.** With few examples a label, it comes out too low, and lower still in a
resample (F1 is not linear, and rare labels drop out). The percentile interval then lies too low
twice over: of 77 labels with 600 examples it held the truth 5 times of 10. So the resamples are
moved up by twice their mean distance from the figure, the bootstrap's estimate of both (chapter
10): 9 of 10. A paired difference needs none of it, since both sides are biased alike: 96 of 100.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunefork.evaluate.intervals import Error, error_of, wilson, with_seeds
from tunefork.evaluate.metrics import METRICS

__all__ = [
    "FEWEST_EXAMPLES",
    "METRICS",
    "Columns",
    "Difference",
    "Interval",
    "estimate",
    "num_examples",
    "paired_difference",
]

Columns = dict[str, NDArray[Any]]
"""Name -> one value an example. Forgetting's columns have passages for examples."""

FEWEST_EXAMPLES = 10
"""Below this many examples nothing counts as detected (module docstring)."""

_CHUNK = 2_000_000
"""Resampled values held at once."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """One side's figure minus the other's, with its 95 % interval."""

    value: float
    low: float
    high: float
    share_above: float
    """Probability of a difference above 0, by the distribution whose 95 % interval this is; at most
    1 - 2^-n, because n examples all fall on one side by chance that often."""
    num_examples: int
    """Compared one by one."""


def estimate(metric: str, runs: Sequence[Columns], *, samples: int, seed: int = 0) -> Interval:
    """The mean of `metric` over `runs` (one a training seed) with its 95 % interval."""
    definition = METRICS[metric]
    values = _values(metric, runs)
    value = float(values.mean())
    size = num_examples(metric, runs)
    if definition.is_count:
        error = _error_of_share(value, _right(metric, runs), len(runs), values)
    elif definition.most == 1.0 and value in (0.0, 1.0):  # No resample would differ.
        error = _error_of_share(value, np.full(size, value), len(runs), values)
    else:
        resampled = np.concatenate(
            [_resampled(metric, runs, chosen) for chosen in _draws(size, samples, seed)]
        )
        if definition.is_biased:
            resampled = np.minimum(resampled + 2 * (value - resampled.mean()), definition.most)
        if definition.is_exponential:
            error = error_of(float(np.log(value)), np.log(resampled), size, [np.log(values)])
            low, high = value * np.exp(-error.below), value * np.exp(error.above)
            return Interval(value, max(float(low), definition.least), float(high))
        error = error_of(value, resampled, size, [values])
    low = max(value - error.below, definition.least)
    high = min(value + error.above, definition.most)
    return Interval(value, min(low, value), max(high, value))


def paired_difference(
    metric: str,
    runs_a: Sequence[Columns],
    runs_b: Sequence[Columns],
    *,
    samples: int,
    by_seed: bool = False,
    seed: int = 0,
) -> Difference:
    """`metric` of a minus that of b, on the same resampled examples.

    `by_seed`: runs_a[i] and runs_b[i] share a training seed, so that they are paired by that, too.
    Raises ValueError where the two were not evaluated on the same examples, or have not equally
    many seeds to pair.
    """
    size = num_examples(metric, runs_a)
    if size != num_examples(metric, runs_b):
        raise ValueError(f"{metric}: the two sides were evaluated on different examples")
    if by_seed and len(runs_a) != len(runs_b):
        raise ValueError(f"{metric}: the two sides have different seeds")
    values_a, values_b = _values(metric, runs_a), _values(metric, runs_b)
    value = float(values_a.mean() - values_b.mean())
    seeds = [values_a - values_b] if by_seed else [values_a, values_b]
    centre, resampled = _resampled_difference(metric, runs_a, runs_b, value, samples, seed)
    error = error_of(centre, resampled, size, seeds)
    by_chance = 0.5**size
    span = METRICS[metric].most - METRICS[metric].least
    return Difference(
        value,
        min(max(centre - error.below, -span), value),
        max(min(centre + error.above, span), value),
        min(max(error.share_above(centre), by_chance), 1 - by_chance),
        size,
    )


def _resampled_difference(
    metric: str,
    runs_a: Sequence[Columns],
    runs_b: Sequence[Columns],
    value: float,
    samples: int,
    seed: int,
) -> tuple[float, NDArray[np.float64]]:
    """What the bootstrap is centred on, and its differences, (B,).

    With one example won by each side added for shares that are counted, and for others where the
    examples are all alike, so that no resample differs.
    """
    size, definition = num_examples(metric, runs_a), METRICS[metric]
    if definition.is_count:
        won = _right(metric, runs_a) - _right(metric, runs_b)
    else:
        resampled = np.concatenate(
            [
                _resampled(metric, runs_a, chosen) - _resampled(metric, runs_b, chosen)
                for chosen in _draws(size, samples, seed)
            ]
        )
        if definition.most > 1 or resampled.std() > 0:
            return value, resampled
        won = np.full(size, value)
    won = np.append(won, (1.0, -1.0))
    draws = _draws(len(won), samples, seed)
    return float(won.mean()), np.concatenate([won[chosen].mean(-1) for chosen in draws])


def num_examples(metric: str, runs: Sequence[Columns]) -> int:
    """How many examples `metric` is computed from, the same for every run."""
    [length] = {len(run[METRICS[metric].columns[0]]) for run in runs}
    return length


def _values(metric: str, runs: Sequence[Columns]) -> NDArray[np.float64]:
    """The metric of each run on all its examples: (runs,)."""
    definition = METRICS[metric]
    return np.array(
        [definition.compute([run[c][None] for c in definition.columns])[0] for run in runs]
    )


def _right(metric: str, runs: Sequence[Columns]) -> NDArray[np.float64]:
    """Of each example, the share of runs that are right (for `is_count`): (N,)."""
    definition = METRICS[metric]
    each = [definition.compute([run[c][:, None] for c in definition.columns]) for run in runs]
    right: NDArray[np.float64] = np.mean(each, axis=0)
    return right


def _error_of_share(
    value: float, right: NDArray[np.float64], num_runs: int, values: NDArray[np.float64]
) -> Error:
    """Wilson's interval, by the number of independent answers that N examples' runs amount to.

    That number is N for one run and N x runs at most, by how alike the runs are: the effective
    sample size of surveys (Kish 1965).
    """
    variance = float(right.var())
    size = len(right)
    effective = float(size)
    if variance > 0:
        effective = min(size * num_runs, size * value * (1 - value) / variance)
    low, high = wilson(value, effective)
    return with_seeds(value - low, high - value, variance / size, max(1, size - 1), [values])


def _draws(size: int, samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Resampled indices of `size` examples in chunks (B, size); the same for the same seed."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // size)
    for start in range(0, samples, chunk):
        yield rng.integers(0, size, (min(chunk, samples - start), size))


def _resampled(
    metric: str, runs: Sequence[Columns], chosen: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Mean over runs of the metric on each resample: (B,)."""
    definition = METRICS[metric]
    total = np.zeros(len(chosen))
    for run in runs:
        total += definition.compute([run[column][chosen] for column in definition.columns])
    return total / len(runs)
