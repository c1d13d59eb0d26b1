"""The page's figures: what quality costs (Pareto), rank by rank, and losses by learning rate."""

from collections.abc import Callable

import matplotlib
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from tunefork.evaluate.statistics import METRICS
from tunefork.page.drawing import Drawing, finish, make_axes
from tunefork.page.svg import BAND, INK, QUIET, SERIES, STYLE, svg_element
from tunefork.page.units import (
    METRIC_NAMES,
    SHARES,
    count_text,
    gain_text,
    metric_text,
    seconds_text,
)
from tunefork.sweep.result import Configuration, SweepResult

_MARKERS = ("o", "s", "^", "D", "v", "P")


def drawings(result: SweepResult) -> list[Drawing]:
    """The figures that the sweep has data for."""
    with matplotlib.rc_context(STYLE):
        found = [
            _pareto(result, "parameters", lambda each: each.trainable_params, count_text),
            _pareto(result, "forgetting", _forgetting, lambda x: f"{x:+.3f}"),
            _pareto(result, "time", lambda each: each.train_s, seconds_text),
            _ranks(result),
            _rates(result),
        ]
    return [drawing for drawing in found if drawing is not None]


def _forgetting(each: Configuration) -> float | None:
    return None if each.forgetting is None else each.forgetting.value


def _pareto(
    result: SweepResult,
    cost: str,
    of: Callable[[Configuration], float | None],
    text: Callable[[float], str],
) -> Drawing | None:
    """Quality against one cost; the front of these two joined by a line."""
    metric, factor = result.primary_metric, _factor(result)
    points = [
        (x, each)
        for each in result.configurations
        if each.status == "ok" and (x := of(each)) is not None
    ]
    costs = [x for x, _ in points]
    if len(points) < 2 or max(costs) - min(costs) <= _SAME * abs(max(costs)):
        return None
    figure, axes = make_axes(height=2.9)
    ranks = sorted({each.rank for _, each in points})
    for at, rank in enumerate(ranks):
        own = [(x, each.metrics[metric]) for x, each in points if each.rank == rank]
        colour, marker = SERIES[at % len(SERIES)], _MARKERS[at % len(_MARKERS)]
        for x, value in own:
            axes.plot([x, x], [factor * value.low, factor * value.high], color=colour, linewidth=1)
        axes.plot(
            [x for x, _ in own],
            [factor * value.value for _, value in own],
            marker,
            color=colour,
            markersize=5,
            label=f"rank {rank}",
        )
    front = _front([(x, each.metrics[metric].value) for x, each in points], metric)
    axes.plot(
        [x for x, _ in front], [factor * y for _, y in front], color=QUIET, linewidth=0.8, zorder=0
    )
    if cost == "parameters" and len({x for x, _ in points}) > 1:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(sorted({x for x, _ in points}))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: text(x)))
    finish(axes, _COSTS[cost], _unit(result))
    title = f"{METRIC_NAMES[metric][:1].upper()}{METRIC_NAMES[metric][1:]} and {cost}"
    caption = (
        "Each configuration, the mean over its seeds, with its 95 % interval. The line joins those "
        f"that no other beats in both ({_COSTS[cost]}: less is better)."
    )
    said = "; ".join(
        f"{each.name} {text(x)}, {metric_text(metric, each.metrics[metric].value)}"
        for x, each in points
    )
    return Drawing(title, caption, svg_element(figure, f"pareto-{cost}", f"{title}: {said}."))


_SAME = 0.1
"""Costs that differ by less than this share of the highest are one, and no picture."""
_COSTS = {
    "parameters": "trained parameters",
    "forgetting": "forgetting, nats per token",
    "time": "training time of one variant",
}


def _front(points: list[tuple[float, float]], metric: str) -> list[tuple[float, float]]:
    """Those that no other beats in cost and quality, by cost."""
    sign = 1 if METRICS[metric].higher_is_better else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


def _ranks(result: SweepResult) -> Drawing | None:
    """Each rank's best setting against the chosen one's."""
    effect, metric, factor = result.rank_effect, result.primary_metric, _factor(result)
    if effect is None:
        return None
    others = [(rank, rank.gain) for rank in effect.ranks if rank.gain is not None]
    figure, axes = make_axes(height=0.75 + 0.42 * len(others))
    axes.axvspan(-factor * result.margin, factor * result.margin, color=BAND, linewidth=0)
    axes.axvline(0, color=QUIET, linewidth=0.8)
    for y, (_, gain) in enumerate(others):
        axes.plot([factor * gain.low, factor * gain.high], [y, y], color=INK)
        axes.plot([factor * gain.value], [y], "o", color=INK, markersize=6)
    axes.set_yticks(range(len(others)), [f"rank {rank.rank}" for rank, _ in others])
    axes.set_ylim(len(others) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x")
    axes.set_xlabel(f"{_gain_unit(result)} (right: better)")
    reference = next(rank for rank in effect.ranks if rank.gain is None)
    title = f"Each rank at its best setting, against rank {reference.rank}"
    caption = (
        "Dot: measured on the evaluation examples. Line: 95 % interval, paired; one that crosses 0 "
        "could be chance. Band: the margin that would not matter. The setting of each rank was "
        "chosen by the validation loss."
    )
    said = "; ".join(f"rank {rank.rank} {gain_text(metric, gain)}" for rank, gain in others)
    return Drawing(title, caption, svg_element(figure, "ranks", f"{title}: {said}."))


def _rates(result: SweepResult) -> Drawing | None:
    """Validation loss against learning rate, a line a rank."""
    if result.rate_effect is None:
        return None
    figure, axes = make_axes(height=2.9)
    said, ticks = [], dict[float, str]()
    for at, rank in enumerate(result.rate_effect.ranks):
        points = sorted((float(rate), loss) for rate, loss in rank.losses.items())
        ticks |= {float(rate): rate for rate in rank.losses}
        colour, marker = SERIES[at % len(SERIES)], _MARKERS[at % len(_MARKERS)]
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker=marker, markersize=4, color=colour, label=f"rank {rank.rank}")
        axes.plot([rank.best], [min(y)], "o", markersize=11, fillstyle="none", color=colour)
        said.append(f"rank {rank.rank} is best at {rank.best:g}")
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [ticks[rate] for rate in sorted(ticks)])
    axes.xaxis.set_minor_locator(NullLocator())
    finish(axes, "learning rate", "nats per supervised token")
    title = "Validation loss by learning rate and rank"
    caption = "The ring marks the best rate of each rank; what did not come to its end is left out."
    return Drawing(title, caption, svg_element(figure, "rates", f"{title}: {'; '.join(said)}."))


def _factor(result: SweepResult) -> int:
    return 100 if result.primary_metric in SHARES else 1


def _unit(result: SweepResult) -> str:
    name = METRIC_NAMES[result.primary_metric]
    return f"{name}, %" if result.primary_metric in SHARES else name


def _gain_unit(result: SweepResult) -> str:
    name = METRIC_NAMES[result.primary_metric]
    return f"points of {name}" if result.primary_metric in SHARES else name
