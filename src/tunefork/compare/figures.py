"""The report's figures: what each shows, drawn from the comparison alone.

Methods differ by colour, dash and marker, so that none of these is needed to tell them apart; each
figure says in words what it shows. svg.py makes the drawings part of the page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from tunefork.compare.comparison import NAMES, TRAINED, Comparison, Trained
from tunefork.compare.evidence import Gain, gain
from tunefork.page.drawing import Drawing, finish, make_axes
from tunefork.page.estimate import Estimate
from tunefork.page.svg import BAND, COLOURS, INK, QUIET, STYLE, svg_element
from tunefork.page.units import (
    METRIC_NAMES,
    SHARES,
    count_text,
    difference_text,
    interval_text,
    rate_text,
)

_DASHES: dict[Trained, str] = {"lora": "-", "qlora": "--", "full": "-."}
_MARKERS: dict[Trained, str] = {"lora": "o", "qlora": "s", "full": "^"}


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a forest plot."""

    label: str
    estimate: Estimate
    colour: str = INK
    marker: str = "o"


def drawings(comparison: Comparison) -> list[Drawing]:
    """The figures that the comparison has data for."""
    with matplotlib.rc_context(STYLE):
        found = [draw(comparison) for draw in (_between, _over_base, _losses, _search, _forgetting)]
    return [drawing for drawing in found if drawing is not None]


def _between(comparison: Comparison) -> Drawing | None:
    """The methods against each other, with the margin."""
    arms, metric = _finished(comparison), comparison.primary_metric
    pairs = [(a, b) for i, b in enumerate(arms) for a in arms[i + 1 :]]
    gains = [gain(comparison.paired, metric, a, b) for a, b in pairs]
    caption = (
        f"How much better the first is than the second, in {_unit(comparison)}. Dot: measured. "
        "Line: 95 % interval, compared example by example; one that crosses 0 could be chance. "
        f"Band: the margin of {difference_text(metric, comparison.margin)} that would not matter."
    )
    return _gains(comparison, "between", "Method against method", caption, gains, comparison.margin)


def _over_base(comparison: Comparison) -> Drawing | None:
    """Each method against the untouched base."""
    if comparison.primary_metric not in comparison.methods["base"].metrics:
        return None
    arms, metric = _finished(comparison), comparison.primary_metric
    gains = [gain(comparison.paired, metric, arm, "base") for arm in arms]
    caption = f"How much better than the base, in {_unit(comparison)}, with 95 % intervals."
    return _gains(comparison, "over-base", "Against the untouched base", caption, gains, 0.0)


def _gains(
    comparison: Comparison,
    key: str,
    title: str,
    caption: str,
    gains: Sequence[Gain],
    margin: float,
) -> Drawing | None:
    """A forest plot of `gains` and the band of `margin`, in points for shares."""
    if not gains:
        return None
    metric = comparison.primary_metric
    factor = 100 if metric in SHARES else 1
    lines = []
    for g in gains:
        estimate = Estimate(value=factor * g.value, low=factor * g.low, high=factor * g.high)
        lines.append(_Line(f"{NAMES[g.a]} over {NAMES[g.b]}", estimate))
    figure, axes = make_axes(height=0.75 + 0.42 * len(lines))
    if margin:
        axes.axvspan(-factor * margin, factor * margin, color=BAND, linewidth=0)
    _forest(axes, lines, f"{_unit(comparison)} (right: better)")
    said = "; ".join(
        f"{line.label} {difference_text(metric, g.value, signed=True)}, "
        f"{interval_text(metric, Estimate(value=g.value, low=g.low, high=g.high))}"
        for line, g in zip(lines, gains, strict=True)
    )
    return Drawing(title, caption, svg_element(figure, key, f"{title}: {said}."))


def _forgetting(comparison: Comparison) -> Drawing | None:
    """Change of the loss on general text."""
    lines = []
    for arm in _finished(comparison):
        forgetting = comparison.methods[arm].forgetting
        if forgetting is not None and forgetting.change is not None:
            lines.append(_Line(NAMES[arm], forgetting.change, COLOURS[arm], _MARKERS[arm]))
    if not lines:
        return None
    figure, axes = make_axes(height=0.75 + 0.42 * len(lines))
    _forest(axes, lines, "change of the loss, nats per token (right: worse)")
    caption = (
        "Loss on general text that is not the training domain: after training minus before, with "
        "95 % intervals. Right of 0 the model has become worse at it."
    )
    said = "; ".join(
        f"{line.label} {line.estimate.value:+.3f}, {line.estimate.low:+.3f} to "
        f"{line.estimate.high:+.3f}"
        for line in lines
    )
    return Drawing("Forgetting", caption, svg_element(figure, "forgetting", f"Forgetting: {said}."))


def _forest(axes: Axes, lines: Sequence[_Line], label: str) -> None:
    """A dot and its interval for each line, the first on top, and the line of no difference."""
    axes.axvline(0, color=QUIET, linewidth=0.8)
    for y, line in enumerate(lines):
        ends = [line.estimate.low, line.estimate.high]
        axes.plot(ends, [y, y], color=line.colour, solid_capstyle="butt")
        axes.plot([line.estimate.value], [y], line.marker, color=line.colour, markersize=6)
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x")
    axes.set_xlabel(label)


def _losses(comparison: Comparison) -> Drawing | None:
    """Training loss against tokens."""
    arms = [arm for arm in _finished(comparison) if comparison.methods[arm].loss_curve]
    if not arms:
        return None
    figure, axes = make_axes(height=2.8)
    said = []
    for arm in arms:
        curve = comparison.methods[arm].loss_curve
        _plot(axes, arm, [(point.tokens, point.loss) for point in curve], marker="")
        said.append(f"{NAMES[arm]} from {curve[0].loss:.3f} to {curve[-1].loss:.3f}")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count_text(tokens)))
    finish(axes, "training tokens", "nats per supervised token")
    caption = (
        f"Loss of each training step, seed {comparison.methods[arms[0]].seeds[0]}, at the learning "
        "rate that the search chose."
    )
    title = "Training loss"
    return Drawing(title, caption, svg_element(figure, "losses", f"{title}: {'; '.join(said)}."))


def _search(comparison: Comparison) -> Drawing | None:
    """Validation loss against learning rate: the longest trial of each rate."""
    figure, axes = make_axes(height=2.8)
    said, ticks = [], set[float]()
    for arm in _finished(comparison):
        result = comparison.methods[arm]
        longest = {t.learning_rate: t for t in sorted(result.search, key=lambda t: t.rung)}
        losses = {rate: longest[rate].validation_loss for rate in sorted(longest)}
        points = [(rate, loss) for rate, loss in losses.items() if loss is not None]
        if len(losses) < 2 or not points:
            continue
        _plot(axes, arm, points, marker=_MARKERS[arm])
        chosen = [point for point in points if point[0] == result.learning_rate]
        for rate, loss in chosen:
            axes.plot(rate, loss, "o", markersize=12, fillstyle="none", color=COLOURS[arm])
        ticks.update(losses)
        figures = ", ".join(f"{rate_text(rate)} gives {loss:.3f}" for rate, loss in points)
        said.append(f"{NAMES[arm]} {figures}")
    if not said:
        return None
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [rate_text(rate) for rate in sorted(ticks)])
    axes.xaxis.set_minor_locator(NullLocator())
    finish(axes, "learning rate", "nats per supervised token")
    caption = (
        "Loss on a validation split of the training data, the longest trial of each rate. The ring "
        "marks the rate chosen; a rate that diverged is not drawn."
    )
    title = "Search of the learning rate"
    return Drawing(title, caption, svg_element(figure, "search", f"{title}: {'; '.join(said)}."))


def _finished(comparison: Comparison) -> list[Trained]:
    """Methods with a figure for the primary metric, in the order of the columns."""
    return [
        arm
        for arm in TRAINED
        if arm in comparison.methods
        and comparison.primary_metric in comparison.methods[arm].metrics
    ]


def _unit(comparison: Comparison) -> str:
    name = METRIC_NAMES[comparison.primary_metric]
    return f"points of {name}" if comparison.primary_metric in SHARES else name


def _plot(axes: Axes, arm: Trained, points: Sequence[tuple[float, float]], marker: str) -> None:
    x, y = zip(*points, strict=True)
    colour, name = COLOURS[arm], NAMES[arm]
    axes.plot(x, y, _DASHES[arm], marker=marker, markersize=5, color=colour, label=name)
