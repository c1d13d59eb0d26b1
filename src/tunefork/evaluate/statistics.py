"""Intervals for every figure, and paired differences between methods.

An evaluation leaves *columns*, one value an example. A metric is a function of them, and the
bootstrap (Efron and Tibshirani 1993, chapters 13 and 16) resamples the examples to see how much the
metric would move with other examples from the same source. Two methods are compared on the *same*
resampled examples, so that what is hard for both cancels out: that is the pairing.

**Several seeds.** With n >= 2 runs a side, each a training seed, the figure is the mean over runs
and its error has two parts, added as variances: the examples' (all runs on one resample) and the
seeds'. Resampling 2 to 5 seeds is known to give intervals that are too short, so the seeds' part is
taken from theory: s^2 / n, with s the standard deviation of the runs' figures (of their
differences, where both sides have the same seeds), and Student's t with n - 1 degrees of freedom.
The bootstrap's percentile interval is widened by that part:

    half-width = sqrt(bootstrap half-width^2 + (t * s / sqrt(n))^2),    each side by itself

This errs on the wide side, because s also holds some of the examples' noise. With one run there is
no such part, and the verdict says so.

**Why percentiles.** The metrics are means and smooth functions of means over hundreds of examples;
there the percentile interval is nearly exact and needs no acceleration constant.

**Macro-F1 is biased.** With few examples a label, it comes out too low, and lower still in a
resample (F1 is not linear, and rare labels drop out). The percentile interval then lies too low
twice over: of 77 labels with 600 examples it held the truth 5 times of 10. So the resamples are
moved up by twice their mean distance from the figure, the bootstrap's estimate of both (chapter
10): 9 of 10. A paired difference needs none of it, since both sides are biased alike: 96 of 100.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]
"""Name -> one value an example. Forgetting's columns have passages for examples."""

_CHUNK = 2_000_000
"""Resampled values held at once."""

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, 97.5 % point, for 1 to 10 degrees of freedom; the last serves for more."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """One side's figure minus the other's, its 95 % interval, and how often it is above 0."""

    value: float
    low: float
    high: float
    share_above: float
    """Of the resamples; ties count half. With several seeds, of a normal distribution with this
    95 % interval."""


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """What a metric is computed from, and which way is better."""

    columns: tuple[str, ...]
    compute: Callable[[Sequence[NDArray[Any]]], NDArray[np.float64]]
    """Columns resampled to (B, N) -> the metric of each resample, (B,)."""
    higher_is_better: bool
    unit: str
    is_biased: bool = False
    """Its bootstrap is moved by the bias found (module docstring), to 1 at most."""


def _ratio(columns: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = columns[0].sum(-1) / columns[1].sum(-1)
    return total


def _mean(columns: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    return np.asarray(columns[0].mean(-1), dtype=np.float64)


def _accuracy(columns: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    return np.asarray((columns[0] == columns[1]).mean(-1), dtype=np.float64)


def _macro_f1(columns: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """Mean over the labels that occur, as truth or answer, of 2 TP / (2 TP + FP + FN)."""
    predicted, gold = columns[0].astype(np.int64), columns[1].astype(np.int64)
    num_resamples = len(gold)
    num_labels = int(max(predicted.max(), gold.max())) + 1
    offset = num_labels * np.arange(num_resamples)[:, None]

    def count(labels: NDArray[np.int64], chosen: NDArray[Any] | None = None) -> NDArray[np.int64]:
        flat = (labels + offset)[chosen] if chosen is not None else (labels + offset).ravel()
        counts = np.bincount(flat, minlength=num_labels * num_resamples)
        return counts.reshape(num_resamples, num_labels)

    both = count(gold) + count(predicted)
    scores = 2 * count(gold, predicted == gold) / np.maximum(both, 1)
    result: NDArray[np.float64] = scores.sum(-1) / (both > 0).sum(-1)
    return result


METRICS: dict[str, MetricDefinition] = {
    "loss": MetricDefinition(("loss_sum", "tokens"), _ratio, False, "nats per token"),
    "perplexity": MetricDefinition(
        ("loss_sum", "tokens"), lambda columns: np.exp(_ratio(columns)), False, ""
    ),
    "accuracy": MetricDefinition(("predicted", "gold"), _accuracy, True, "share"),
    "macro_f1": MetricDefinition(("predicted", "gold"), _macro_f1, True, "share", True),
    "exact_match": MetricDefinition(("exact_match",), _mean, True, "share"),
    "rouge_l": MetricDefinition(("rouge_l",), _mean, True, "share"),
    "forgetting_loss": MetricDefinition(
        ("forgetting_loss_sum", "forgetting_tokens"), _ratio, False, "nats per token"
    ),
}


def estimate(metric: str, runs: Sequence[Columns], *, samples: int, seed: int = 0) -> Interval:
    """The mean of `metric` over `runs` (one a training seed) with its 95 % interval."""
    values = _values(metric, runs)
    value = float(values.mean())
    resampled = np.concatenate(
        [_resampled(metric, runs, chosen) for chosen in _draws(metric, runs, samples, seed)]
    )
    if METRICS[metric].is_biased:
        resampled = np.minimum(resampled + 2 * (value - resampled.mean()), 1.0)
    low, high = _interval(value, resampled, values)
    return Interval(value, low, high)


def paired_difference(
    metric: str,
    runs_a: Sequence[Columns],
    runs_b: Sequence[Columns],
    *,
    samples: int,
    seed: int = 0,
) -> Difference:
    """`metric` of a minus that of b, on the same resampled examples.

    Sides with equally many runs are paired by seed, too. Raises ValueError where the two were not
    evaluated on the same examples.
    """
    if _num_examples(metric, runs_a) != _num_examples(metric, runs_b):
        raise ValueError(f"{metric}: the two sides were evaluated on different examples")
    values_a, values_b = _values(metric, runs_a), _values(metric, runs_b)
    value = float(values_a.mean() - values_b.mean())
    resampled = np.concatenate(
        [
            _resampled(metric, runs_a, chosen) - _resampled(metric, runs_b, chosen)
            for chosen in _draws(metric, [*runs_a, *runs_b], samples, seed)
        ]
    )
    is_paired = len(values_a) == len(values_b)
    seeds = [values_a - values_b] if is_paired else [values_a, values_b]
    low, high = _interval(value, resampled, *seeds)
    above = float((resampled > 0).mean() + 0.5 * (resampled == 0).mean())
    if any(len(values) > 1 for values in seeds):
        above = _share_above(value, low, high)
    return Difference(value, low, high, above)


def _values(metric: str, runs: Sequence[Columns]) -> NDArray[np.float64]:
    """The metric of each run on all its examples: (runs,)."""
    definition = METRICS[metric]
    return np.array(
        [definition.compute([run[c][None] for c in definition.columns])[0] for run in runs]
    )


def _num_examples(metric: str, runs: Sequence[Columns]) -> int:
    [length] = {len(run[METRICS[metric].columns[0]]) for run in runs}
    return length


def _draws(
    metric: str, runs: Sequence[Columns], samples: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Resampled example indices in chunks, (B, N) each; the same for the same seed and N."""
    num_examples = _num_examples(metric, runs)
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // num_examples)
    for start in range(0, samples, size):
        yield rng.integers(0, num_examples, (min(size, samples - start), num_examples))


def _resampled(
    metric: str, runs: Sequence[Columns], chosen: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Mean over runs of the metric on each resample: (B,)."""
    definition = METRICS[metric]
    total = np.zeros(len(chosen))
    for run in runs:
        total += definition.compute([run[column][chosen] for column in definition.columns])
    return total / len(runs)


def _interval(
    value: float, resampled: NDArray[np.float64], *seeds: NDArray[np.float64]
) -> tuple[float, float]:
    """Percentile interval, widened by each group of runs' own variance (module docstring)."""
    low, high = (float(q) for q in np.quantile(resampled, (0.025, 0.975)))
    extra = sum(_seed_half_width(values) ** 2 for values in seeds)
    if extra > 0:
        low = value - math.sqrt(max(0.0, value - low) ** 2 + extra)
        high = value + math.sqrt(max(0.0, high - value) ** 2 + extra)
    return low, high


def _seed_half_width(values: NDArray[np.float64]) -> float:
    if len(values) < 2:
        return 0.0
    t = _T_975[min(len(values) - 2, len(_T_975) - 1)]
    return float(t * values.std(ddof=1) / math.sqrt(len(values)))


def _share_above(value: float, low: float, high: float) -> float:
    """Probability of a value above 0 for a normal error whose 95 % interval is the given one."""
    half_width = value - low if value > 0 else high - value
    if half_width == 0:
        return 0.5 if value == 0 else float(value > 0)
    return 0.5 * (1 + math.erf(1.96 * value / half_width / math.sqrt(2)))
