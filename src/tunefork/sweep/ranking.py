"""The configurations of a sweep, ranked: their figures over seeds, paired, and who is beaten.

Everything is chosen by the validation loss and judged on the evaluation examples, so that the
winner is not the luckiest: the best of 32 on the examples it was picked by looks better than it is
(Cawley and Talbot 2010, https://www.jmlr.org/papers/v11/cawley10a.html). The intervals against the
chosen one are those of single comparisons; of 20 equals one would be expected to exclude 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tunefork.evaluate.statistics import METRICS, Columns, Difference, estimate, paired_difference
from tunefork.page.estimate import Estimate
from tunefork.recipe import Metric
from tunefork.sweep.result import Configuration, VariantResult


@dataclass(frozen=True, slots=True)
class Run:
    """A variant, and one value an example of what was measured of it."""

    result: VariantResult
    columns: Columns | None
    """On the evaluation examples; None unless it came to its end."""


@dataclass(frozen=True, slots=True)
class Judge:
    """How two sides are compared."""

    metric: Metric
    margin: float
    samples: int
    """Resamples behind every interval."""

    def gain(self, a: Sequence[Run], b: Sequence[Run], metric: Metric | None = None) -> Difference:
        """How much better `a` does than `b`, above 0 is better, paired by example and seed."""
        metric = metric or self.metric
        common = {run.result.seed for run in a} & {run.result.seed for run in b}
        if common:  # the seeds that only one of them finished would compare other things
            a, b = ([run for run in side if run.result.seed in common] for side in (a, b))
        found = paired_difference(
            metric, _columns(a), _columns(b), samples=self.samples, by_seed=bool(common)
        )
        if METRICS[metric].higher_is_better:
            return found
        return opposite(found)

    def value(self, runs: Sequence[Run], metric: Metric | None = None) -> Estimate:
        """The mean over `runs`, with its interval."""
        found = estimate(metric or self.metric, _columns(runs), samples=self.samples)
        return Estimate(value=found.value, low=found.low, high=found.high)


def opposite(found: Difference) -> Difference:
    """Of the other side over this one."""
    value, low, high = (0.0 - x for x in (found.value, found.high, found.low))  # never -0.0
    return Difference(value, low, high, 1 - found.share_above, found.num_examples)


def as_estimate(found: Difference) -> Estimate:
    """Its value and interval."""
    return Estimate(value=found.value, low=found.low, high=found.high)


def by_configuration(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Configuration -> its runs, in order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.result.configuration, []).append(run)
    return found


def finished(runs: Sequence[Run]) -> list[Run]:
    """Those that came to their end and were evaluated."""
    return [run for run in runs if run.columns is not None]


def validation_loss(runs: Sequence[Run]) -> float | None:
    """Mean over `runs`, nats; None where one of them has none."""
    losses = [loss for run in runs if (loss := run.result.validation_loss) is not None]
    return sum(losses) / len(losses) if losses and len(losses) == len(runs) else None


def choose(runs: Sequence[Run]) -> str | None:
    """The configuration with the lowest validation loss of those that came to their end whole."""
    losses = {
        name: loss
        for name, own in by_configuration(runs).items()
        if len(finished(own)) == len(own) and (loss := validation_loss(own)) is not None
    }
    if not losses:  # none has all its seeds
        losses = {
            name: loss
            for name, own in by_configuration(finished(runs)).items()
            if (loss := validation_loss(own)) is not None
        }
    return min(losses, key=lambda name: losses[name], default=None)


def configurations(runs: Sequence[Run], judge: Judge, chosen: str | None) -> list[Configuration]:
    """Ranked, best first."""
    each = by_configuration(runs)
    reference = finished(each[chosen]) if chosen is not None else []
    found = [_configuration(name, own, judge, chosen, reference) for name, own in each.items()]
    front = _front(found, judge.metric)
    found = [each.model_copy(update={"is_pareto": each.name in front}) for each in found]
    return sorted(found, key=lambda each: _order(each, judge.metric))


def _configuration(
    name: str, own: Sequence[Run], judge: Judge, chosen: str | None, reference: Sequence[Run]
) -> Configuration:
    done, first = finished(own), own[0].result
    values = {knob: value for knob, value in first.values.items() if knob != "seed"}
    forgotten = [run.result.forgetting for run in done if run.result.forgetting is not None]
    counted = done or own
    return Configuration(
        name=name,
        values=values,
        rank=first.rank,
        learning_rate=first.learning_rate,
        seeds=tuple(run.result.seed for run in done),
        status="ok" if done else first.status,
        validation_loss=validation_loss(counted),
        metrics={metric: judge.value(done, metric) for metric in _metrics(done)},
        gain=as_estimate(judge.gain(done, reference)) if done and name != chosen else None,
        forgetting=_mean(forgotten) if forgotten else None,
        trainable_params=first.trainable_params,
        train_s=sum(run.result.train_s for run in counted) / len(counted),
    )


def _order(each: Configuration, metric: Metric) -> tuple[int, float, float]:
    """Sorts first what is better."""
    if each.status == "ok":
        value = each.metrics[metric].value
        sign = -1 if METRICS[metric].higher_is_better else 1
        return 0, sign * value, each.validation_loss or 0.0
    place = ("interrupted", "dropped", "failed").index(each.status) + 1
    loss = each.validation_loss
    return place, -each.train_s, float("inf") if loss is None else loss


def _front(found: Sequence[Configuration], metric: Metric) -> set[str]:
    """Names of those that no other beats in quality, forgetting, parameters and time at once."""
    sign = -1 if METRICS[metric].higher_is_better else 1
    costs = {
        each.name: (
            sign * each.metrics[metric].value,
            0.0 if each.forgetting is None else each.forgetting.value,
            each.trainable_params,
            each.train_s,
        )
        for each in found
        if each.status == "ok"
    }
    return {
        name
        for name, own in costs.items()
        if not any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True))
            for other in costs.values()
        )
    }


def _metrics(runs: Sequence[Run]) -> list[Metric]:
    return list(runs[0].result.metrics) if runs else []


def _columns(runs: Sequence[Run]) -> list[Columns]:
    return [run.columns for run in runs if run.columns is not None]


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of figures on the same passages: the mean of the ends, which errs wide."""
    count = len(estimates)
    return Estimate(
        value=sum(e.value for e in estimates) / count,
        low=sum(e.low for e in estimates) / count,
        high=sum(e.high for e in estimates) / count,
    )
