"""How far a figure may be off: half-widths of 95 % intervals, and Student's distribution.

**Few examples.** A percentile interval of n examples is too short: it divides by n, not n - 1, and
knows no tails but the normal ones. Both are mended by the factor t / 1.96 * sqrt(n / (n - 1)), t
Student's 97.5 % point with n - 1 degrees of freedom: the expanded percentile interval of Hesterberg
2015 (https://doi.org/10.1080/00031305.2015.1089789), here as a factor and not as a quantile further
out, which the extremes of a small sample could not give. Percentiles are also too short for losses,
whose tails are heavy; so each side is at least t times the bootstrap's standard error.

**One example** has no spread. The mean of a normal distribution is within 9.68 times the one value
seen, at least 95 times of 100, whatever its variance (Wall, Boen and Tweedie 2001, The American
Statistician 55, 102): an interval that always holds 0, so that it detects nothing.

**Shares** (accuracy, exact match). That n answers of n are right does not prove 100 %, but a
bootstrap resamples no mistake that was not made, and its percentiles are Wald's interval, which
is too short near 0 and 1. Wilson's is neither (Brown, Cai and DasGupta 2001,
https://doi.org/10.1214/ss/1009213286), and agrees with it elsewhere.

**Seeds.** s^2 / k, with s the standard deviation of k runs' figures, is added as a variance, with
Student's t for k - 1 degrees of freedom. Where both parts count, their tails have the degrees of
freedom of Welch 1947 and Satterthwaite 1946.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Z_975 = 1.959964
"""97.5 % point of the normal distribution."""
_NORMAL_FROM = 1000
"""Degrees of freedom from which Student's distribution is taken for the normal one."""
_ONE_EXAMPLE = 9.68
FEWEST_SEEDS = 3
"""Runs from which their variance is part of an interval. Two have t = 12.7: their interval would
say next to nothing, and the verdict says instead that training's variance is unmeasured."""


@dataclass(frozen=True, slots=True)
class Error:
    """How far a figure may be off: half of a 95 % interval to each side."""

    below: float
    above: float
    degrees: int
    """Of freedom of the Student distribution whose tails the figure's error has."""

    def share_above(self, centre: float) -> float:
        """Probability that a figure of `centre` is above 0, by that distribution."""
        half = self.below if centre > 0 else self.above
        if half == 0:
            return 0.5 if centre == 0 else float(centre > 0)
        return student_cdf(student_975(self.degrees) * centre / half, self.degrees)


def error_of(
    centre: float,
    resampled: NDArray[np.float64],
    num_examples: int,
    seeds: Sequence[NDArray[np.float64]] = (),
) -> Error:
    """From the bootstrap's figures (B,) of `num_examples` examples, and each group's runs (k,)."""
    if num_examples == 1:
        half = _ONE_EXAMPLE * abs(centre)
        return Error(half, half, 1)
    degrees = num_examples - 1
    correction = math.sqrt(num_examples / degrees)
    standard_error = correction * float(resampled.std())
    t = student_975(degrees)
    low, high = (float(q) for q in np.quantile(resampled, (0.025, 0.975)))
    below, above = (
        max(t / Z_975 * correction * half, t * standard_error)
        for half in (centre - low, high - centre)
    )
    return with_seeds(below, above, standard_error**2, degrees, seeds)


def with_seeds(
    below: float,
    above: float,
    variance: float,
    degrees: int,
    seeds: Sequence[NDArray[np.float64]],
) -> Error:
    """The examples' half-widths, whose squared standard error is `variance`, and the seeds'."""
    parts = [(variance, degrees)]
    extra = 0.0
    for values in seeds:
        if len(values) >= FEWEST_SEEDS:
            of_seeds = float(values.var(ddof=1)) / len(values)
            extra += student_975(len(values) - 1) ** 2 * of_seeds
            parts.append((of_seeds, len(values) - 1))
    if extra == 0:
        return Error(below, above, degrees)
    total = sum(part for part, _ in parts)
    joint = total**2 / sum(part**2 / of for part, of in parts)
    return Error(math.sqrt(below**2 + extra), math.sqrt(above**2 + extra), int(joint))


def wilson(share: float, num_examples: float) -> tuple[float, float]:
    """95 % interval of a share of `num_examples` independent ones."""
    squared = Z_975**2 / num_examples
    middle = (share + squared / 2) / (1 + squared)
    half = (
        Z_975
        / (1 + squared)
        * math.sqrt(share * (1 - share) / num_examples + squared / (4 * num_examples))
    )
    return middle - half, middle + half


@lru_cache
def student_975(degrees: int) -> float:
    """97.5 % point of Student's distribution."""
    low, high = 1.9, 13.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, degrees) < 0.975 else (low, middle)
    return (low + high) / 2


def student_cdf(t: float, degrees: int) -> float:
    """Student's distribution for whole degrees of freedom (Abramowitz and Stegun, 26.7.3, 4)."""
    if degrees >= _NORMAL_FROM:
        return 0.5 * (1 + math.erf(t / math.sqrt(2)))
    angle = math.atan(t / math.sqrt(degrees))
    cosine, is_odd = math.cos(angle), degrees % 2
    term = cosine if is_odd else 1.0
    total = 0.0
    for at in range(1 + is_odd, degrees, 2):
        total += term
        term *= at / (at + 1) * cosine**2
    inside = math.sin(angle) * total
    if is_odd:
        inside = 2 / math.pi * (angle + inside)
    return 0.5 * (1 + inside)
