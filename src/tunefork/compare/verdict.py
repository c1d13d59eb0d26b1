"""The answer in words: which method to choose, how sure that is, and what would change it.

`decide` is a pure function of the figures. What counts as a detected difference, and which method
is recommended among equals, is argued in evidence.py; here it is said. The text never claims more
than was measured: one model of one size, on one data set, with as many seeds as were run.
"""

from collections.abc import Iterator, Mapping, Sequence

from tunefork.compare.cautions import cautions, listed
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
from tunefork.compare.outlook import would_change
from tunefork.page.units import (
    METRIC_NAMES,
    difference_number,
    difference_text,
    figure_text,
    ratio_text,
    sentence,
)
from tunefork.recipe import Metric


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
        cautions(finding, methods, metric, model, data),
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
            yield f"Against {SUBJECTS[other]} it takes {listed(parts)}."


def _standing(gain: Gain, chances: int) -> str:
    """What a difference is worth."""
    if gain.is_detected(chances):
        return "a detectable difference"
    is_apart = gain.low > 0 or gain.high < 0
    return "too few examples to tell" if is_apart and gain.is_of_too_few else "that could be chance"


def _ahead(gain: Gain, metric: Metric) -> str:
    """`ahead of LoRA by 0.7 points (95 % interval -0.9 to 2.3)`, or behind it."""
    if gain.value < 0:
        turned = Gain(gain.b, gain.a, -gain.value, -gain.high, -gain.low, 1 - gain.share)
        return f"behind {SUBJECTS[gain.b]} by {_size(turned, metric)}"
    return f"ahead of {SUBJECTS[gain.b]} by {_size(gain, metric)}"


def _size(gain: Gain, metric: Metric) -> str:
    low, high = (difference_number(metric, value) for value in (gain.low, gain.high))
    return f"{difference_text(metric, gain.value)} (95 % interval {low} to {high})"
