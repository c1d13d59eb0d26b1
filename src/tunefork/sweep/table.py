"""The ranked table, as cells: for the terminal (rich), for Markdown and for the page."""

from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from tunefork.page.units import METRIC_NAMES, count_text, figure_text, gain_text, seconds_text
from tunefork.recipe import Metric
from tunefork.sweep.result import Configuration, RankResult, RateEffect, SweepResult
from tunefork.sweep.summary import base_text, findings, headline, notes

Rows = list[list[str]]


def ranked_rows(result: SweepResult) -> tuple[list[str], Rows]:
    """(heads, a row for each configuration, best first)."""
    primary = result.primary_metric
    others: list[Metric] = [
        metric
        for metric in (result.configurations[0].metrics if result.configurations else ())
        if metric not in (primary, "perplexity", "macro_f1")
    ]
    heads = ["", "configuration", "seeds", METRIC_NAMES[primary], "against the chosen"]
    heads += [METRIC_NAMES[metric] for metric in others]
    heads += ["validation loss", "forgetting", "parameters", "time", ""]
    rows = [
        _row(place, each, result, others)
        for place, each in enumerate(result.configurations, start=1)
    ]
    if base := base_text(result):
        rows.append(["", "untouched base", "", base, *[""] * (len(heads) - 4)])
    return heads, rows


def _row(place: int, each: Configuration, result: SweepResult, others: list[Metric]) -> list[str]:
    primary, is_ok = result.primary_metric, each.status == "ok"
    against = "" if each.gain is None else gain_text(primary, each.gain)
    return [
        str(place) if is_ok else "",
        each.name,
        str(len(each.seeds)) if is_ok else "",
        figure_text(primary, each.metrics[primary]) if is_ok else each.status,
        "chosen" if each.name == result.chosen else against,
        *(figure_text(metric, each.metrics[metric]) if is_ok else "" for metric in others),
        "" if each.validation_loss is None else f"{each.validation_loss:.4f}",
        "" if each.forgetting is None else gain_text("loss", each.forgetting),
        count_text(each.trainable_params),
        seconds_text(each.train_s),
        "Pareto" if each.is_pareto else "",
    ]


def rank_rows(result: SweepResult) -> tuple[list[str], Rows]:
    """(heads, a row for each rank at its best setting)."""
    heads = ["rank", "best setting", METRIC_NAMES[result.primary_metric], "against the chosen"]
    heads += ["standing", "parameters"]
    effect = result.rank_effect
    return heads, [] if effect is None else [_rank_row(rank, result) for rank in effect.ranks]


def _rank_row(rank: RankResult, result: SweepResult) -> list[str]:
    standing = {
        "shown": "equal within the margin",
        "not told apart": "not told apart",
        "worse": "worse",
        "better": "better",
        None: "chosen",
    }[rank.is_equal]
    return [
        str(rank.rank),
        rank.configuration,
        figure_text(result.primary_metric, rank.value),
        "" if rank.gain is None else gain_text(result.primary_metric, rank.gain),
        standing,
        count_text(rank.trainable_params),
    ]


def rate_rows(effect: RateEffect) -> tuple[list[str], Rows]:
    """(heads, a row for each rank): validation loss by learning rate, the best one marked."""
    rates = sorted({rate for rank in effect.ranks for rate in rank.losses}, key=float)
    rows = []
    for rank in effect.ranks:
        lowest = min(rank.losses.values())
        cells = []
        for rate in rates:
            loss = rank.losses.get(rate)
            mark = " *" if loss == lowest else ""
            cells.append("" if loss is None else f"{loss:.4f}{mark}")
        rows.append([str(rank.rank), *cells])
    return ["rank", *rates], rows


def failed_lines(result: SweepResult) -> list[str]:
    """A line for each variant that failed."""
    return [f"{v.name}: {v.error}" for v in result.variants if v.status == "failed"]


def print_sweep(result: SweepResult, report: Path | None, console: Console | None = None) -> None:
    """The table, what it means and where the rest is."""
    console = console or Console(soft_wrap=True)
    heads, rows = ranked_rows(result)
    _print(console, heads, rows)
    heads, rows = rank_rows(result)
    if rows:
        console.print()
        _print(console, heads, rows)
    if result.rate_effect is not None:
        console.print("\nvalidation loss by rank and learning rate")
        _print(console, *rate_rows(result.rate_effect))
    console.print(f"\n[bold]{headline(result)}[/bold]", highlight=False)
    for line in (*findings(result), *failed_lines(result), *notes(result)):
        console.print(line, highlight=False, markup=False)
    if report is not None:
        console.print(f"Report: {report}", highlight=False, markup=False)


_DISPENSABLE = ("loss", "exact match", "ROUGE-L", "seeds", "forgetting", "time", "parameters")
"""Columns that a narrow terminal goes without, the first first; the page has them."""


def _print(console: Console, heads: list[str], rows: Rows) -> None:
    left_out = [at for name in _DISPENSABLE for at, head in enumerate(heads) if head == name]
    shown = list(range(len(heads)))
    table = _table(heads, rows, shown)
    unbounded = console.options.update(max_width=10_000)
    while left_out and Measurement.get(console, unbounded, table).maximum > console.width:
        if (at := left_out.pop(0)) != _PRIMARY:
            shown.remove(at)
        table = _table(heads, rows, shown)
    console.print(table, highlight=False, markup=False)


_PRIMARY = 3
"""Column of the metric that decides."""


def _table(heads: list[str], rows: Rows, shown: list[int]) -> Table:
    table = Table(*(heads[at] for at in shown), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(row[at] for at in shown))
    return table
