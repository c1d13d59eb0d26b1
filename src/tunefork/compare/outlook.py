"""What could overturn a verdict, as concrete things to do, the most useful first."""

import math
from collections.abc import Iterator, Mapping

from tunefork.compare.comparison import SUBJECTS, TRAINED, Arm, Data, MethodResult, Model
from tunefork.compare.evidence import Finding
from tunefork.evaluate.intervals import FEWEST_SEEDS
from tunefork.evaluate.statistics import FEWEST_EXAMPLES
from tunefork.page.units import count_text, difference_text, rate_text, sentence
from tunefork.recipe import Metric

MANY_EXAMPLES = 1_000_000
"""Evaluation sets beyond this are not proposed."""
GENERATED: frozenset[Metric] = frozenset({"exact_match", "rouge_l"})
"""Metrics of generated answers, of which `evaluate.max_generated` allows only so many."""


def would_change(
    finding: Finding,
    methods: Mapping[Arm, MethodResult],
    metric: Metric,
    margin: float,
    model: Model,
    data: Data,
) -> Iterator[str]:
    """Yield one sentence for each thing that could change the verdict of `finding`."""
    for arm, result in methods.items():
        if result.status != "ok":
            subject = sentence(SUBJECTS[arm])
            yield f"{subject} has no figures: mend what stopped it and compare again."
    if not finding.finished:
        return
    yield from _more_examples(finding, metric, margin, data)
    if finding.num_seeds < FEWEST_SEEDS:
        yield (
            "Three seeds or more (compare.seeds: [0, 1, 2]): another seed can move a method by as "
            "much as the methods differ, and that is unmeasured here."
        )
    yield from _search_edges(methods)
    yield from _other_margin(finding, metric, margin)
    if finding.best is None:
        yield (
            f"More or other training data, or more passes over these {data.train_examples:,} "
            "examples (train.epochs)."
        )
    yield (
        f"Another model: this one has {count_text(model.parameters)} parameters; compare again on "
        "the model that would be shipped."
    )


def extent_text(metric: Metric, examples: int, data: Data) -> str:
    """`5 generated answers`"""
    unit = unit_of(metric, examples, data)
    return f"{examples:,} {unit.removesuffix('s') if examples == 1 else unit}"


def unit_of(metric: Metric, examples: int, data: Data) -> str:
    """What the `examples` behind a figure of `metric` are: plain text is counted by its documents,
    where these are enough to draw from, and otherwise by its sequences, as evaluation examples."""
    if metric in GENERATED:
        return "generated answers"
    return "evaluation examples" if examples == data.eval_examples else "documents"


def _more_examples(finding: Finding, metric: Metric, margin: float, data: Data) -> Iterator[str]:
    """How many evaluation examples would shrink the interval to the margin.

    An interval over n independent examples narrows with 1 / sqrt(n). Where seeds add to it, more
    examples narrow it less, so the number is a lower bound.
    """
    if finding.is_singled_out:
        return
    gain = finding.over_base[0] if finding.best is None else None
    gain = gain or (finding.rivals[0] if finding.rivals else None)
    if gain is None or gain.high < 0:
        return
    half_width = (gain.high - gain.low) / 2
    examples = gain.examples or data.eval_examples
    unit = unit_of(metric, examples, data)
    where = (
        " (evaluate.max_generated, and as many evaluation examples)" if metric in GENERATED else ""
    )
    if gain.is_of_too_few and (margin <= 0 or half_width <= margin):
        yield (
            f"{FEWEST_EXAMPLES} {unit} or more{where}, in place of {examples:,}: with fewer, no "
            "difference counts as detected."
        )
    if margin <= 0 or half_width <= margin:
        return
    needed = max(examples * (half_width / margin) ** 2, FEWEST_EXAMPLES)
    size = difference_text(metric, margin)
    pair = f"{SUBJECTS[gain.a]} and {SUBJECTS[gain.b]}"
    if needed > MANY_EXAMPLES:
        yield (
            f"A larger margin (compare.margin): telling {pair} apart to {size} would need over "
            f"a million {unit}."
        )
        return
    step = 10 ** max(0, math.floor(math.log10(needed)) - 1)
    yield (
        f"About {math.ceil(needed / step) * step:,} {unit} or more{where}, in place of "
        f"{examples:,}: enough to tell {pair} apart to {size}, the margin."
    )


def _search_edges(methods: Mapping[Arm, MethodResult]) -> Iterator[str]:
    """Methods whose learning rate may not be their best: unsearched, or at the grid's edge."""
    for method in TRAINED:
        result = methods.get(method)
        if result is None or result.status != "ok" or result.learning_rate is None:
            continue
        rate = rate_text(result.learning_rate)
        tried = sorted({trial.learning_rate for trial in result.search})
        whose = f"{sentence(SUBJECTS[method])}'s learning rate"
        at = f"compare.learning_rates.{method}"
        if len(tried) < 2:
            yield f"{whose}, {rate}, was the only one tried: set compare.search_trials to 3."
        elif math.isclose(result.learning_rate, tried[0], rel_tol=1e-9):
            yield f"{whose}, {rate}, is the lowest tried: add lower ones to {at}."
        elif math.isclose(result.learning_rate, tried[-1], rel_tol=1e-9):
            yield f"{whose}, {rate}, is the highest tried: add higher ones to {at}."


def _other_margin(finding: Finding, metric: Metric, margin: float) -> Iterator[str]:
    """The margin at which a rival would do as well, or no longer would."""
    if not finding.is_singled_out or finding.best is None:
        return
    for rival in finding.rivals:
        bound = difference_text(metric, rival.high)
        if rival.high > margin:
            yield (
                f"If {bound} would not matter (compare.margin), {SUBJECTS[rival.b]} would do as "
                "well, and the cheaper one would be recommended."
            )
        elif finding.recommended != finding.best:
            yield (
                f"If less than {bound} mattered (compare.margin), {SUBJECTS[rival.a]} would be "
                f"recommended over {SUBJECTS[rival.b]}."
            )
