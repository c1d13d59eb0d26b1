"""The metrics: each a function of columns, computed for many resamples at once.

B is the number of resamples, N that of the examples in each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """What a metric is computed from, and which way is better."""

    columns: tuple[str, ...]
    compute: Callable[[Sequence[NDArray[Any]]], NDArray[np.float64]]
    """Columns resampled to (B, N) -> the metric of each resample, (B,)."""
    higher_is_better: bool
    unit: str
    least: float = 0.0
    most: float = math.inf
    """No figure lies outside these, so no interval does."""
    is_count: bool = False
    """A share of examples, each right or wrong."""
    is_biased: bool = False
    """Its bootstrap is moved by the bias found (statistics.py), to `most` at most."""
    is_exponential: bool = False
    """Its interval is made of its logarithm: it moves by factors, not by amounts."""


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
        ("loss_sum", "tokens"),
        lambda columns: np.exp(_ratio(columns)),
        False,
        "",
        least=1.0,
        is_exponential=True,
    ),
    "accuracy": MetricDefinition(
        ("predicted", "gold"), _accuracy, True, "share", most=1.0, is_count=True
    ),
    "macro_f1": MetricDefinition(
        ("predicted", "gold"), _macro_f1, True, "share", most=1.0, is_biased=True
    ),
    "exact_match": MetricDefinition(
        ("exact_match",), _mean, True, "share", most=1.0, is_count=True
    ),
    "rouge_l": MetricDefinition(("rouge_l",), _mean, True, "share", most=1.0),
    "forgetting_loss": MetricDefinition(
        ("forgetting_loss_sum", "forgetting_tokens"), _ratio, False, "nats per token"
    ),
}
