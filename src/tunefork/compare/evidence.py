"""What the measurements say about which method is best: numbers only, no words.

**Detecting.** A difference is detected where its 95 % interval excludes 0, `confidence` is at least
0.95, and it was measured on `FEWEST_EXAMPLES` or more (statistics.py says why so many). The best is
picked after looking, so it needs an adjustment. The claim "A is the best" is made only when A is
ahead of *every* rival, each by its own interval. A wrong claim then needs an error of at most 2.5 %
against the method that really is best; with three methods there are two that could be claimed
wrongly, hence at most 5 %, whatever the correlation (union bound). That is the two-sided pairwise
interval, unadjusted: Hung and Fithian 2016 (https://arxiv.org/abs/1610.03944) show that it is valid
for winner against runner-up for any number of methods. "Some method beats the base" has one chance
a method to be wrong, so there each counts (Bonferroni). Both are
`1 - max(2, chances) * (probability of the wrong side)`.

**Choosing among equals.** Those that cannot be told from the best, or are behind it by less than
the margin, are equal for the purpose, and the cheapest is recommended: least memory x time (search
included), which is what a machine of the right size costs; within a quarter of the least, the
smallest artefact; within a quarter of that, the simplest (LoRA, QLoRA, full).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tunefork.compare.comparison import TRAINED, Arm, MethodResult, PairedDifference, Trained
from tunefork.evaluate.statistics import FEWEST_EXAMPLES, METRICS
from tunefork.recipe import Metric

LEVEL = 0.95
"""Confidence from which a difference counts as detected."""
MOST = 0.999
"""Highest confidence stated: further out, a tail's size rests on its assumed form alone."""
TOLERANCE = 1.25
"""Costs within this factor count as equal: a run's time varies that much on a shared machine."""


@dataclass(frozen=True, slots=True)
class Gain:
    """How much better `a` does than `b` on the primary metric; above 0 is better."""

    a: Arm
    b: Arm
    value: float
    low: float
    high: float
    share: float
    """Probability that `a` does better."""
    examples: int | None = None
    """As PairedDifference.examples."""

    @property
    def is_of_too_few(self) -> bool:
        """Measured on so few examples that nothing counts as detected."""
        return self.examples is not None and self.examples < FEWEST_EXAMPLES

    def confidence(self, chances: int) -> float:
        """That `a` is better than `b`, where `chances` such claims could have been made.

        Below LEVEL wherever the interval reaches 0, so that the two never contradict each other,
        and wherever the examples are too few.
        """
        if self.value <= 0:
            return 0.0
        most = MOST if self.low > 0 and not self.is_of_too_few else LEVEL - (1 - MOST)
        return min(most, max(0.0, 1 - max(2, chances) * (1 - self.share)))

    def is_detected(self, chances: int) -> bool:
        """Whether the interval excludes 0, `confidence` reaches LEVEL and examples are enough."""
        return self.confidence(chances) >= LEVEL


@dataclass(frozen=True, slots=True)
class Finding:
    """The state of the evidence."""

    finished: tuple[Trained, ...]
    """Methods with a figure, best first."""
    over_base: tuple[Gain, ...]
    """Of each finished method, best first; empty where the base has no figure."""
    best: Trained | None = None
    """Measured best of those that beat the base (of all, where the base has no figure). None
    where none does."""
    rivals: tuple[Gain, ...] = ()
    """Of `best` over each other finished method, the least certain first."""
    is_singled_out: bool = False
    """`best` is detectably better than every rival."""
    recommended: Arm | None = None
    """As Verdict.recommended."""
    confidence: float | None = None
    """As Verdict.confidence."""
    examples: int | None = None
    """Fewest behind a difference, as PairedDifference.examples; None without one."""
    num_seeds: int = 0
    """As `num_seeds`."""


def weigh(
    methods: Mapping[Arm, MethodResult],
    paired: Sequence[PairedDifference],
    metric: Metric,
    margin: float,
) -> Finding:
    """Judge `methods` on `metric` (`margin` in its unit) by the `paired` differences.

    Raises ValueError where a pair of finished arms has no difference on `metric`.
    """
    has_base = _has_figure(methods["base"], metric)
    finished = _ranked(methods, metric)
    over_base = tuple(gain(paired, metric, m, "base") for m in finished) if has_base else ()
    examples = [p.examples for p in paired if p.metric == metric and p.examples is not None]
    finding = Finding(
        finished,
        over_base,
        examples=min(examples, default=None),
        num_seeds=num_seeds(methods, paired, metric),
    )
    if not finished:
        return finding
    chances = len(finished)
    worthwhile = [g.a for g in over_base if g.is_detected(chances)] if has_base else finished
    worth: list[Trained] = [method for method in finished if method in worthwhile]
    if not worth:
        best_confidence = max(g.confidence(chances) for g in over_base)
        return replace(finding, recommended="base", confidence=best_confidence)
    best = worth[0]
    others = [gain(paired, metric, best, other) for other in finished if other != best]
    rivals = tuple(sorted(others, key=lambda g: (g.share, g.value)))
    least = rivals[0] if rivals else over_base[0] if over_base else None
    equals: list[Trained] = [best]
    for rival in rivals:
        is_equal = not rival.is_detected(len(rivals)) or rival.high <= margin
        equals += [method for method in worth if method == rival.b and is_equal]
    return replace(
        finding,
        best=best,
        rivals=rivals,
        is_singled_out=least is not None and all(g.is_detected(len(rivals)) for g in rivals),
        recommended=None if least is None else cheapest(methods, equals),
        confidence=None if least is None else least.confidence(len(rivals) or chances),
    )


def gain(paired: Sequence[PairedDifference], metric: Metric, a: Arm, b: Arm) -> Gain:
    """How much better `a` does than `b`, whichever way round `paired` has them."""
    for pair in paired:
        if pair.metric == metric and {pair.a, pair.b} == {a, b}:
            if (pair.a == a) == METRICS[metric].higher_is_better:
                return Gain(
                    a, b, pair.difference, pair.low, pair.high, pair.share_above, pair.examples
                )
            share = 1 - pair.share_above
            return Gain(a, b, -pair.difference, -pair.high, -pair.low, share, pair.examples)
    raise ValueError(f"paired: lacks {metric} of {a} and {b}")


def num_seeds(
    methods: Mapping[Arm, MethodResult], paired: Sequence[PairedDifference], metric: Metric
) -> int:
    """Training runs a method behind the figures and differences of `metric`: the fewest of any.

    From FEWEST_SEEDS on, the intervals include the variance between them.
    """
    finished = _ranked(methods, metric)
    counts = [len(methods[method].seeds) for method in finished]
    counts += [len(pair.seeds) for pair in paired if pair.metric == metric and pair.seeds]
    return min(counts, default=0)


def cheapest(methods: Mapping[Arm, MethodResult], among: Sequence[Trained]) -> Trained:
    """The method of `among` that costs least; an unmeasured cost counts as equal."""
    left = [method for method in TRAINED if method in among]
    for cost in (_memory_time, _artifact):
        costs = {method: cost(methods[method]) for method in left}
        known = [value for value in costs.values() if value is not None]
        limit = TOLERANCE * min(known, default=0.0)
        left = [m for m in left if (value := costs[m]) is None or value <= limit]
    return left[0]


def train_and_search_s(result: MethodResult) -> float | None:
    """Seconds that one trained model cost, its learning-rate search included."""
    return None if result.train_s is None else result.train_s + (result.search_s or 0.0)


def _memory_time(result: MethodResult) -> float | None:
    seconds = train_and_search_s(result)
    if seconds is None or result.peak_memory_bytes is None:
        return None
    return seconds * result.peak_memory_bytes


def _artifact(result: MethodResult) -> float | None:
    return None if result.artifact_bytes is None else float(result.artifact_bytes)


def _has_figure(result: MethodResult, metric: Metric) -> bool:
    return result.status == "ok" and metric in result.metrics


def _ranked(methods: Mapping[Arm, MethodResult], metric: Metric) -> tuple[Trained, ...]:
    """Finished methods, the best figure first; the simpler one first where two are equal."""
    sign = 1 if METRICS[metric].higher_is_better else -1
    finished = [m for m in TRAINED if m in methods and _has_figure(methods[m], metric)]
    return tuple(sorted(finished, key=lambda m: -sign * methods[m].metrics[metric].value))
