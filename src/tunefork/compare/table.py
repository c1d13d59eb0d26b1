"""The comparison as a table: in the terminal, and in Markdown for a README.

`measured_rows` is what was measured, a row a figure, written for people; the terminal's table, the
Markdown table and the report all show those rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunefork.compare.comparison import NAMES, Arm, Comparison, MethodResult
from tunefork.compare.verdict import explanation, headline, subheading
from tunefork.evaluate.statistics import METRICS
from tunefork.page.units import (
    METRIC_NAMES,
    bytes_text,
    count_text,
    interval_text,
    metric_text,
    rate_text,
    seconds_text,
    share_text,
    usd_text,
)

WIDTH = 100
"""Columns where the output is no terminal and says no width."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure as text, and what goes with it (its interval, say)."""

    figure: str = "-"
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure for every arm."""

    key: str
    """`memory`, or `metric:accuracy`: what it measures."""
    label: str
    note: str
    """The label's unit or direction."""
    cells: dict[Arm, Cell]


def measured_rows(comparison: Comparison) -> list[Row]:
    """What was measured; rows that no arm has a figure for are left out."""
    rows = [
        Row(key, label, note, {arm: cell(comparison.methods[arm]) for arm in comparison.arms})
        for key, label, note, cell in _columns(comparison)
    ]
    return [row for row in rows if any(cell != Cell() for cell in row.cells.values())]


def _columns(comparison: Comparison) -> Iterator[tuple[str, str, str, Callable[..., Cell]]]:
    """Key, label, note, and how a cell is made of a MethodResult."""
    kinds = {result.memory_kind for result in comparison.methods.values()}
    if any(result.status != "ok" for result in comparison.methods.values()):
        yield "status", "status", "", lambda result: Cell(result.status)
    yield "share", "parameters trained", "", _share
    yield "memory", "peak memory", "whole process" if "resident" in kinds else "on the GPU", _memory
    yield "time", "training time", "of one run", _time
    yield "planned", "predicted before", "memory, time", _planned
    yield "speed", "training speed", "tokens/s", _speed
    yield "artifact", "artefact", "on disk", _artifact
    yield "rate", "learning rate", "", _rate
    for metric, name in METRIC_NAMES.items():
        direction = "higher is better" if METRICS[metric].higher_is_better else "lower is better"
        yield f"metric:{metric}", name, direction, lambda r, m=metric: _metric(r, m)
    yield "forgetting", "forgetting", "nats per token", _forgetting
    price = comparison.usd_per_hour
    at = "" if price is None else f"at {usd_text(price)} an hour"
    yield "cost", "cost", at, _cost


def _share(result: MethodResult) -> Cell:
    if result.trainable_share is None or result.trainable_params is None:
        return Cell()
    if result.trainable_params == 0:
        return Cell("none")
    digits = 0 if result.trainable_share == 1 else 2
    return Cell(share_text(result.trainable_share, digits), count_text(result.trainable_params))


def _memory(result: MethodResult) -> Cell:
    if result.peak_memory_bytes is None:
        return Cell()
    return Cell(bytes_text(result.peak_memory_bytes))


def _planned(result: MethodResult) -> Cell:
    if result.predicted_memory_bytes is None or result.predicted_train_s is None:
        return Cell()
    return Cell(bytes_text(result.predicted_memory_bytes), seconds_text(result.predicted_train_s))


def _time(result: MethodResult) -> Cell:
    if result.train_s is None:
        return Cell()
    search = f"search {seconds_text(result.search_s)}" if result.search_s else ""
    return Cell(seconds_text(result.train_s), search)


def _speed(result: MethodResult) -> Cell:
    return Cell() if result.tokens_per_s is None else Cell(f"{result.tokens_per_s:,.0f}")


def _artifact(result: MethodResult) -> Cell:
    return Cell() if result.artifact_bytes is None else Cell(bytes_text(result.artifact_bytes))


def _rate(result: MethodResult) -> Cell:
    if result.learning_rate is None:
        return Cell()
    tried = len({trial.learning_rate for trial in result.search})
    return Cell(rate_text(result.learning_rate), f"best of {tried}" if tried > 1 else "unsearched")


def _metric(result: MethodResult, metric: str) -> Cell:
    for name, estimate in result.metrics.items():
        if name == metric:
            return Cell(metric_text(name, estimate.value), interval_text(name, estimate))
    return Cell()


def _forgetting(result: MethodResult) -> Cell:
    if result.forgetting is None or result.forgetting.change is None:
        return Cell()
    change = result.forgetting.change
    return Cell(f"{change.value:+.3f}", f"{change.low:+.3f} to {change.high:+.3f}")


def _cost(result: MethodResult) -> Cell:
    return Cell() if result.cost_usd is None else Cell(usd_text(result.cost_usd))


def print_comparison(comparison: Comparison, report: Path, console: Console | None = None) -> None:
    """Print the table, the verdict and where the report lies; reads in 100 columns.

    Without a terminal the output is the same text, uncoloured and WIDTH columns wide.
    """
    console = console or Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(_table(comparison))
    verdict = comparison.verdict
    lines = [headline(verdict), subheading(verdict, comparison.primary_metric)]
    console.print()
    console.print(Text(". ".join(filter(None, lines)) + ".", style="bold"))
    console.print(Text("\n\n".join(explanation(verdict))))
    if verdict.would_change:
        console.print("\nWhat would change this:")
    for change in verdict.would_change:
        item = Table.grid(padding=(0, 1))
        item.add_row("-", Text(change))
        console.print(item)
    console.print()
    console.print(Text(f"Report: {report}"), soft_wrap=True)


def _table(comparison: Comparison) -> Table:
    table = Table(title=Text(_title(comparison)), title_justify="left", caption=_CAPTION)
    table.caption_justify = "left"
    table.add_column("")
    for arm in comparison.arms:
        table.add_column(NAMES[arm], justify="right")
    for row in measured_rows(comparison):
        label = Text(row.label)
        label.append(f"\n{row.note}" if row.note else "", style="dim")
        cells = []
        for cell in row.cells.values():
            text = Text(cell.figure)
            text.append(f"\n{cell.detail}" if cell.detail else "", style="dim")
            cells.append(text)
        table.add_row(label, *cells)
    return table


_CAPTION = (
    "Under a score: its 95 % interval. Methods are compared example by example, which is sharper."
)


def _title(comparison: Comparison) -> str:
    return (
        f"{comparison.model.id}: {comparison.data.train_examples:,} training examples, "
        f"{comparison.data.eval_examples:,} evaluation examples"
    )


def markdown_table(comparison: Comparison) -> str:
    """The same rows as a Markdown table, one line a row."""
    head = ["", *(NAMES[arm] for arm in comparison.arms)]
    lines = [head, ["---", *("---:" for _ in comparison.arms)]]
    for row in measured_rows(comparison):
        label = f"{row.label} ({row.note})" if row.note else row.label
        cells = (f"{c.figure} ({c.detail})" if c.detail else c.figure for c in row.cells.values())
        lines.append([label, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
