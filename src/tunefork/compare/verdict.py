"""The answer in words: which method to choose, how sure that is, and what would change it.

`decide` is a pure function of the figures. What counts as a detected difference, and which method
is recommended among equals, is argued in evidence.py; here it is said. The text never claims more
than was measured: one model of one size, on one data set, with as many seeds as were run.
"""

from collections.abc import Iterator, Mapping, Sequence

from tunefork.compare.comparison import (
    SUBJECTS,
    Arm,
    Data,
    MethodResult,
    Model,
    PairedDifference,
    Verdict,
)
from tunefork.compare.evidence import Finding, Gain, train_and_search_s, weigh
from tunefork.compare.outlook import extent_text, would_change
from tunefork.evaluate.intervals import FEWEST_SEEDS
from tunefork.evaluate.statistics import FEWEST_EXAMPLES
from tunefork.page.units import (
    METRIC_NAMES,
    count_text,
    difference_number,
    difference_text,
    figure_text,
    metric_text,
    ratio_text,
    sentence,
)
from tunefork.recipe import Metric

FEW_EXAMPLES = 30
"""Below this many the interval of a skewed figure is visibly too narrow (the table in
evaluate/statistics.py), and the verdict says so."""


def decide(
    methods: Mapping[Arm, MethodResult],
    paired: Sequence[PairedDifference],
    *,
    metric: Metric,
    margin: float,
    model: Model,
    data: Data,
) -> Verdict:
    """Judge the finished `methods` on `metric`; a difference of `margin` would not matter.

    `paired` holds the difference of every two finished arms on `metric`; ValueError where not.
    """
    finding = weigh(methods, paired, metric, margin)
    paragraphs = (
        _answer(finding, methods, metric, margin),
        _costs(finding, methods),
        _cautions(finding, methods, metric, model, data),
    )
    singled_out = finding.best if finding.is_singled_out else None
    return Verdict(
        method=singled_out or "no_detectable_difference",
        recommended=finding.recommended,
        confidence=finding.confidence,
        text="\n\n".join(filter(None, (" ".join(sentences) for sentences in paragraphs))),
        would_change=tuple(would_change(finding, methods, metric, margin, model, data)),
    )


def headline(verdict: Verdict) -> str:
    """The answer in a line: `Choose LoRA`."""
    if verdict.recommended is None:
        return "No answer: there is nothing to compare"
    if verdict.recommended == "base":
        return "Do not fine-tune on this evidence"
    return f"Choose {SUBJECTS[verdict.recommended]}"


def subheading(verdict: Verdict, metric: Metric) -> str:
    """How firm the answer is, in a line; empty where there is none."""
    if verdict.recommended is None or verdict.confidence is None:
        return ""
    name, sure = METRIC_NAMES[metric], confidence_text(verdict.confidence)
    if verdict.recommended == "base":
        return (
            f"No method is detectably better than the untouched base in {name}; confidence in the "
            f"best of them {sure}"
        )
    if verdict.method == "no_detectable_difference":
        return (
            f"No method is detectably better than every other in {name}; confidence in the one "
            f"measured best {sure}"
        )
    if verdict.method != verdict.recommended:
        better = sentence(SUBJECTS[verdict.method])
        return f"{better} is better in {name} (confidence {sure}), but by less than matters"
    return f"Better in {name}; confidence {sure}"


def explanation(verdict: Verdict) -> list[str]:
    """The paragraphs of `verdict.text` as they follow its headline."""
    return verdict.text.removeprefix(f"{headline(verdict)}. ").split("\n\n")


def confidence_text(confidence: float) -> str:
    """`97 %`, `above 99 %`; it is a lower bound, of which less than a half says nothing."""
    if confidence < 0.5:
        return "below 50 %"
    return "above 99 %" if confidence > 0.99 else f"{100 * confidence:.0f} %"


def _answer(
    finding: Finding, methods: Mapping[Arm, MethodResult], metric: Metric, margin: float
) -> Iterator[str]:
    """What to choose and what that rests on."""
    if not finding.finished:
        yield f"No method finished with a figure for {METRIC_NAMES[metric]}: no answer."
    elif finding.best is None:
        yield from _base_stands(finding, methods, metric)
    elif finding.recommended is None:
        only = SUBJECTS[finding.best]
        yield f"Only {only} finished, and the base has no figure: there is nothing to compare."
    else:
        chosen, name = finding.recommended, METRIC_NAMES[metric]
        over_base = [gain for gain in finding.over_base if gain.a == chosen]
        versus = [f"{_size(gain, metric)} better than the untouched base" for gain in over_base]
        figure = f"It reaches {name} {figure_text(metric, methods[chosen].metrics[metric])}"
        yield f"Choose {SUBJECTS[chosen]}. {', '.join([figure, *versus])}."
        if chosen == finding.best:
            yield from _best_is_chosen(finding, metric)
        else:
            lost = next(gain for gain in finding.rivals if gain.b == chosen)
            yield from _cheaper_is_chosen(lost, metric, margin, len(finding.rivals))


def _base_stands(
    finding: Finding, methods: Mapping[Arm, MethodResult], metric: Metric
) -> Iterator[str]:
    first = finding.over_base[0]
    figure = f"{METRIC_NAMES[metric]} {figure_text(metric, methods['base'].metrics[metric])}"
    subject = sentence(SUBJECTS[first.a])
    if all(over.high < 0 for over in finding.over_base):
        yield (
            "Do not fine-tune on this evidence. Every method does worse than the untouched base "
            f"({figure}). {subject}, the best of them, is {_ahead(first, metric)}."
        )
    else:
        yield (
            "Do not fine-tune on this evidence. No method does detectably better than the "
            f"untouched base ({figure}). {subject}, measured best, is {_ahead(first, metric)}."
        )


def _best_is_chosen(finding: Finding, metric: Metric) -> Iterator[str]:
    """The best method against each rival, the nearest first."""
    if not finding.rivals:
        yield "No other method has a figure, so it is judged against the base alone."
    for rival in sorted(finding.rivals, key=lambda gain: gain.value):
        yield f"It is {_ahead(rival, metric)}: {_standing(rival, len(finding.rivals))}."
    behind = [g.a for g in finding.over_base if not g.is_detected(len(finding.finished))]
    for method in behind:
        yield f"{sentence(SUBJECTS[method])} does not detectably beat the untouched base."
    if not finding.is_singled_out and len(behind) < len(finding.rivals):
        yield "Of those that cannot be told apart, it also costs least."


def _cheaper_is_chosen(lost: Gain, metric: Metric, margin: float, chances: int) -> Iterator[str]:
    """What could be lost by choosing `lost.b`, which costs less, in place of the best, `lost.a`."""
    best = SUBJECTS[lost.a]
    low, high = (difference_number(metric, value) for value in (lost.low, lost.high))
    yield (
        f"{sentence(best)}, measured best, is ahead of it by {difference_text(metric, lost.value)} "
        f"(95 % interval {low} to {high}): {_standing(lost, chances)}."
    )
    worst, matters = difference_text(metric, lost.high), difference_text(metric, margin)
    if lost.high <= margin:
        yield (
            f"So it is at most {worst} worse, which is within the margin of {matters} that would "
            "not matter, and it costs less."
        )
    else:
        yield (
            f"It costs less, but it could be up to {worst} worse, which is more than the margin of "
            f"{matters}: if so much would matter, measure more before deciding."
        )


def _costs(finding: Finding, methods: Mapping[Arm, MethodResult]) -> Iterator[str]:
    """What the recommended method costs beside each other one."""
    if finding.best is None or finding.recommended is None:
        return
    chosen = methods[finding.recommended]
    for other in finding.finished:
        b = methods[other]
        pairs = (
            (chosen.peak_memory_bytes, b.peak_memory_bytes, "the memory"),
            (train_and_search_s(chosen), train_and_search_s(b), "the time (search included)"),
            (chosen.artifact_bytes, b.artifact_bytes, "the artefact size"),
        )
        parts = [f"{ratio_text(x / y)} {what}" for x, y, what in pairs if x is not None and y]
        if other != finding.recommended and parts:
            yield f"Against {SUBJECTS[other]} it takes {_listed(parts)}."


def _cautions(
    finding: Finding,
    methods: Mapping[Arm, MethodResult],
    metric: Metric,
    model: Model,
    data: Data,
) -> Iterator[str]:
    """What the figures do not show."""
    for arm, result in methods.items():
        if result.status != "ok":
            why = f": {_first_line(result.error)}" if result.error else ""
            how = "was interrupted" if result.status == "interrupted" else "failed"
            yield f"{sentence(SUBJECTS[arm])} {how} and is not judged{why}."
        elif result.error:
            yield f"{sentence(SUBJECTS[arm])} lacks a run: {_first_line(result.error)}."
    if not finding.finished:
        return
    yield from _forgotten(finding, methods)
    if not finding.over_base:
        yield "Without the base's figure, whether fine-tuning pays at all is unmeasured."
    if metric == "accuracy" and data.majority_share is not None:
        best = methods[finding.best or finding.finished[0]].metrics[metric]
        share = metric_text(metric, data.majority_share)
        yield f"Always answering the most frequent label would reach {share}" + (
            "."
            if best.low > data.majority_share
            else ", and the best method is not detectably above."
        )
    if finding.num_seeds < FEWEST_SEEDS:
        runs = (
            "one training run" if finding.num_seeds == 1 else f"{finding.num_seeds} training runs"
        )
        yield (
            f"With {runs} a method, the variance of training is unmeasured: the intervals cover "
            "the choice of evaluation examples only."
        )
    yield from _extent(finding, metric, model, data)


def _forgotten(finding: Finding, methods: Mapping[Arm, MethodResult]) -> Iterator[str]:
    """Where what is recommended lost more of its general text than another that finished."""
    changes = {
        arm: result.forgetting.change
        for arm, result in methods.items()
        if result.forgetting is not None and result.forgetting.change is not None
    }
    chosen = changes.get(finding.recommended) if finding.recommended else None
    if chosen is None or chosen.low <= 0:
        return
    less = [arm for arm in finding.finished if arm in changes and changes[arm].high < chosen.low]
    if less:
        others = [f"that of {SUBJECTS[arm]} by {changes[arm].value:.2f}" for arm in less]
        yield (
            f"It forgets more: on general text its loss rose by {chosen.value:.2f} nats a token, "
            f"{_listed(others)}."
        )


def _extent(finding: Finding, metric: Metric, model: Model, data: Data) -> Iterator[str]:
    """How much was measured, and what so little cannot show."""
    examples = finding.examples or data.eval_examples
    measured = extent_text(metric, examples, data)
    if examples < FEWEST_EXAMPLES:
        yield (
            f"With only {measured} nothing counts as detected, whatever the intervals: that takes "
            f"{FEWEST_EXAMPLES}, and {FEW_EXAMPLES} or more where a few odd ones could decide."
        )
    elif examples < FEW_EXAMPLES:
        yield (
            f"With only {measured} the intervals are too narrow where a few odd ones decide; give "
            f"{FEW_EXAMPLES} or more."
        )
    whole = f" (of {data.eval_examples:,} evaluation examples)"
    yield (
        f"Measured on {model.id} ({count_text(model.parameters)} parameters) and {measured}"
        f"{whole if examples < data.eval_examples else ''}; it says nothing about a model of "
        "another size."
    )


def _standing(gain: Gain, chances: int) -> str:
    """What a difference is worth."""
    if gain.is_detected(chances):
        return "a detectable difference"
    is_apart = gain.low > 0 or gain.high < 0
    return "too few examples to tell" if is_apart and gain.is_of_too_few else "that could be chance"


def _listed(parts: Sequence[str]) -> str:
    """`a, b and c`"""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _ahead(gain: Gain, metric: Metric) -> str:
    """`ahead of LoRA by 0.7 points (95 % interval -0.9 to 2.3)`, or behind it."""
    if gain.value < 0:
        turned = Gain(gain.b, gain.a, -gain.value, -gain.high, -gain.low, 1 - gain.share)
        return f"behind {SUBJECTS[gain.b]} by {_size(turned, metric)}"
    return f"ahead of {SUBJECTS[gain.b]} by {_size(gain, metric)}"


def _size(gain: Gain, metric: Metric) -> str:
    low, high = (difference_number(metric, value) for value in (gain.low, gain.high))
    return f"{difference_text(metric, gain.value)} (95 % interval {low} to {high})"


def _first_line(error: str) -> str:
    line = error.strip().splitlines()[0].rstrip(".")
    return line if len(line) <= 200 else line[:197] + "..."
