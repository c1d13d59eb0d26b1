"""What `tunefork train-many` prints at its end: a line an adapter."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from tunefork.page.units import METRIC_NAMES, figure_text, seconds_text
from tunefork.sweep.many_result import ManyResult


def print_many(result: ManyResult, folder: Path, console: Console | None = None) -> None:
    """Each adapter's figures, where it is, and what went wrong."""
    console = console or Console(soft_wrap=True)
    metrics = list(dict.fromkeys(m for entry in result.entries for m in entry.metrics))
    shown = [metric for metric in metrics if metric not in ("perplexity", "macro_f1")]
    heads = ["adapter", "status", "steps", *(METRIC_NAMES[m] for m in shown), "time", "published"]
    table = Table(*heads, box=None, pad_edge=False)
    for column in (table.columns[0], table.columns[-1]):  # names are there to be copied
        column.overflow = "fold"
    for entry in result.entries:
        table.add_row(
            entry.name,
            entry.status,
            str(entry.num_steps),
            *(figure_text(m, entry.metrics[m]) if m in entry.metrics else "" for m in shown),
            seconds_text(entry.train_s),
            entry.published or "",
        )
    console.print(table, highlight=False, markup=False)
    for entry in result.entries:
        if entry.error is not None:
            line = f"{entry.where} ({entry.name}): {entry.error}"
            console.print(line, highlight=False, markup=False)
    console.print(f"Runs: {folder}", highlight=False, markup=False)
