"""A run's record on the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from tunefork.registry.run import RunRecord
from tunefork.train.progress import duration


def print_metrics(metrics: dict[str, tuple[float, float, float]], console: Console) -> None:
    """A table of figures with their 95 % intervals."""
    table = Table("metric", "value", "95 % interval", box=None, pad_edge=False)
    for name, (value, low, high) in metrics.items():
        table.add_row(name, f"{value:.4g}", f"{low:.4g} to {high:.4g}")
    console.print(table)


def print_record(record: RunRecord, folder: Path, console: Console) -> None:
    """What a training run was, and where it left what."""
    if record.peak_memory_bytes is not None and record.tokens_per_s is not None:
        console.print(
            f"{record.method}: {record.status}, {record.num_steps} steps, "
            f"{record.tokens:,} tokens in {duration(record.train_s)} "
            f"({record.tokens_per_s:,.0f} tokens/s), "
            f"peak {record.peak_memory_bytes / 2**30:.2f} GiB"
            + (
                f", activation checkpointing: {kept}"
                if (kept := record.activation_checkpointing)
                else ""
            ),
            highlight=False,
        )
    if record.predicted_memory_bytes is not None and record.predicted_step_s is not None:
        planned_s = record.predicted_step_s * record.num_steps
        console.print(
            f"predicted: {duration(planned_s)}, {record.predicted_memory_bytes / 2**30:.2f} GiB",
            highlight=False,
        )
    if record.metrics:
        print_metrics(record.metrics, console)
    if record.artifact is not None:
        console.print(f"{folder / record.artifact}", highlight=False, soft_wrap=True)
