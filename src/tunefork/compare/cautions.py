"""What the figures of a comparison do not show, in sentences under its verdict."""

from collections.abc import Iterator, Mapping, Sequence

from tunefork.compare.comparison import SUBJECTS, Arm, Data, MethodResult, Model
from tunefork.compare.evidence import Finding
from tunefork.compare.outlook import extent_text
from tunefork.evaluate.intervals import FEWEST_SEEDS
from tunefork.evaluate.statistics import FEWEST_EXAMPLES
from tunefork.page.units import count_text, metric_text, sentence
from tunefork.recipe import Metric

FEW_EXAMPLES = 30
"""Below this many the interval of a skewed figure is visibly too narrow (the table in
evaluate/statistics.py), and the verdict says so."""


def cautions(
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
            f"{listed(others)}."
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


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`"""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _first_line(error: str) -> str:
    line = error.strip().splitlines()[0].rstrip(".")
    return line if len(line) <= 200 else line[:197] + "..."
