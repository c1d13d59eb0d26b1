"""`report.html`: the comparison as one page that can be sent, read on a phone and printed.

The page needs no script and no other file: style and figures are in it. It says the verdict first,
then what was measured beside the rules of thumb, then everything that a doubting reader would ask.
Every text is escaped; model ids, labels and errors may hold markup.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from tunefork.compare.claims import claims
from tunefork.compare.comparison import NAMES, Arm, Comparison
from tunefork.compare.evidence import num_seeds
from tunefork.compare.figures import drawings
from tunefork.compare.outlook import extent_text
from tunefork.compare.table import Cell, measured_rows
from tunefork.compare.verdict import explanation, headline, subheading
from tunefork.evaluate.intervals import FEWEST_SEEDS
from tunefork.evaluate.statistics import FEWEST_EXAMPLES
from tunefork.page.html import render, write_page
from tunefork.page.units import (
    METRIC_NAMES,
    bytes_text,
    count_text,
    difference_number,
    difference_text,
    sentence,
    share_text,
    usd_text,
)
from tunefork.recipe import Metric

TEMPLATE = "tunefork.compare/report.html.j2"


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the page to `path`. Raises TuneforkError where it cannot be written."""
    write_page(report_html(comparison), path)


def report_html(comparison: Comparison) -> str:
    """The page as text; the same comparison gives the same text."""
    verdict, primary = comparison.verdict, comparison.primary_metric
    rows = measured_rows(comparison)
    found = {claim.row: claim for claim in claims(comparison)}
    return render(
        TEMPLATE,
        comparison=comparison,
        headline=headline(verdict),
        subheading=subheading(verdict, primary),
        explanation=explanation(verdict),
        origin=_origin(comparison),
        arms=[NAMES[arm] for arm in comparison.arms],
        rows=rows,
        claims={row.key: found.get(row.key) for row in rows},
        drawings=drawings(comparison),
        differences=list(_differences(comparison)),
        metrics=[METRIC_NAMES[metric] for metric in _metrics(comparison)],
        primary=METRIC_NAMES[primary],
        data=list(_data(comparison)),
        conduct=list(_conduct(comparison)),
        machine=list(_machine(comparison)),
        recipe=yaml.safe_dump(comparison.recipe, sort_keys=False, allow_unicode=True),
        sentence=sentence,
    )


def _origin(comparison: Comparison) -> str:
    return (
        f"LoRA, QLoRA or full fine-tuning of {comparison.model.id}, compared on "
        f"{comparison.created[:10]} by tunefork {comparison.tunefork_version}"
    )


def _metrics(comparison: Comparison) -> list[Metric]:
    """The metrics that were compared, the primary one first."""
    found = dict.fromkeys(pair.metric for pair in comparison.paired)
    return sorted(found, key=lambda metric: metric != comparison.primary_metric)


def _differences(comparison: Comparison) -> Iterator[tuple[str, list[Cell]]]:
    """A row for every pair of arms: its name, and a cell for each of `_metrics`."""
    cells: dict[tuple[Arm, Arm], dict[Metric, Cell]] = {}
    for pair in comparison.paired:
        figure = difference_text(pair.metric, pair.difference, signed=True)
        low, high = (difference_number(pair.metric, x, signed=True) for x in (pair.low, pair.high))
        cells.setdefault((pair.a, pair.b), {})[pair.metric] = Cell(figure, f"{low} to {high}")
    for (a, b), row in cells.items():
        figures = [row.get(metric, Cell()) for metric in _metrics(comparison)]
        yield f"{NAMES[a]} minus {NAMES[b]}", figures


def _data(comparison: Comparison) -> Iterator[tuple[str, str]]:
    data = comparison.data
    yield "Training examples", f"{data.train_examples:,} ({count_text(data.tokens)} tokens)"
    yield "Evaluation examples", f"{data.eval_examples:,}, used for no choice"
    for metric, examples in _measured_on(comparison).items():
        if examples != data.eval_examples:
            what = extent_text(metric, examples, data)
            yield sentence(METRIC_NAMES[metric]), f"measured on {what}"
    supervised = f"{share_text(data.supervised_share)} of the training tokens"
    yield "Supervised", f"{supervised}: what the model must learn to produce"
    if data.labels is not None:
        yield "Labels", f"{data.labels:,}"
    if data.majority_share is not None:
        share = share_text(data.majority_share)
        yield "Most frequent label", f"always answering it would be right {share} of the time"


def _measured_on(comparison: Comparison) -> dict[Metric, int]:
    """How many examples each metric was computed from, where that is recorded."""
    return {pair.metric: pair.examples for pair in comparison.paired if pair.examples is not None}


def _conduct(comparison: Comparison) -> Iterator[str]:
    """What makes the comparison fair, and how each figure came about."""
    yield (
        "Every method trained on the same examples in the same order and was evaluated on the same "
        "evaluation examples; so was the untouched base."
    )
    trials = [trial for result in comparison.methods.values() for trial in result.search]
    if trials:
        most = max(trial.examples for trial in trials)
        yield (
            "Each method's learning rate was searched by itself, with equally many trials, by "
            f"successive halving on up to {most:,} training examples; the lowest loss on a "
            "validation split of the training data won. The evaluation data played no part."
        )
    else:
        yield "The learning rates were not searched."
    seeds = ", ".join(map(str, comparison.seeds))
    yield f"Seeds: {seeds}. Times are those of one training run, the mean over seeds."
    kinds = {result.memory_kind for result in comparison.methods.values()}
    if "resident" in kinds:
        yield (
            "Each method ran in a process of its own. Peak memory is that whole process's while "
            "training, Python and libraries included."
        )
    if "cuda_allocated" in kinds:
        yield (
            "Each method ran in a process of its own. Peak memory is that of the tensors on the "
            "GPU while training; the CUDA context comes on top."
        )
    seeds_part = (
        "and over training seeds"
        if num_seeds(comparison.methods, comparison.paired, comparison.primary_metric)
        >= FEWEST_SEEDS
        else f"and leave the variance of training out, which takes {FEWEST_SEEDS} seeds to measure"
    )
    yield (
        "Intervals are 95 % intervals over evaluation examples, by the bootstrap, widened for "
        f"their number (by Wilson for accuracy and exact match), {seeds_part}. Two methods are "
        "compared example by example, which leaves out what makes an example hard for both."
    )
    yield (
        "A method is named best only where its interval against every other method excludes 0 on "
        f"{FEWEST_EXAMPLES} examples or more; "
        "otherwise the cheapest of those that cannot be told apart is recommended (memory x time, "
        "then size of the artefact)."
    )
    if comparison.usd_per_hour is not None:
        yield (
            f"Costs are at {usd_text(comparison.usd_per_hour)} an hour for the search and one "
            "training run."
        )
    yield (
        "The rules of thumb are those of practitioners' guides of 2026. One that speaks of a size "
        "or a unit that was not run counts as not measurable here."
    )


def _machine(comparison: Comparison) -> Iterator[tuple[str, str]]:
    device = comparison.device
    threads = "" if device.threads is None else f", {device.threads} threads"
    yield "Device", f"{device.name}{threads}, {bytes_text(device.memory_bytes)} of memory"
    yield "Base", f"{comparison.model.id}, {count_text(comparison.model.parameters)} parameters"
    yield "tunefork", comparison.tunefork_version
    yield "torch", device.torch
    yield "transformers", device.transformers
    yield "Made", comparison.created
    for arm, result in comparison.methods.items():
        if result.artifact is not None:
            yield f"{NAMES[arm]} artefact", result.artifact
