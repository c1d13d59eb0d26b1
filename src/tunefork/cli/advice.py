"""An advice on the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tunefork.advise.advice import Advice, Own, Reason
from tunefork.page.units import bytes_text, counted, rate_text, seconds_text, usd_text

WIDTH = 100
"""Columns at most: long lines are hard to read."""


def print_advice(advice: Advice, recipe_out: Path | None) -> None:
    """The answer, what it takes, why, and what would change it."""
    console = Console(highlight=False)
    console = Console(highlight=False, width=min(console.width, WIDTH))
    console.print(Text(advice.text, style="bold"))
    console.print(f"Confidence {advice.confidence}. {advice.confidence_text}")
    for warning in advice.warnings:
        console.print(Text(f"! {warning}", style="bold red"))
    _section(console, "Start from", _starts(advice))
    _section(console, "Serve", [advice.serving])
    _where(console, advice)
    _section(console, "Why", [_reason(reason) for reason in advice.reasons])
    _section(console, "Against it", [_reason(reason) for reason in advice.against])
    _section(console, "What would change it", advice.would_change)
    _section(console, "Measured by you", advice.measured)
    _section(console, "Not said", [f"{m.key}: {m.effect}" for m in advice.missing])
    _section(console, "Assumed", advice.assumptions)
    if advice.recipe_yaml is None:
        return
    if recipe_out is None:
        console.print("\nA recipe to start from: the same command with --recipe-out FILE.")
    else:
        console.print(f"\n{recipe_out}", soft_wrap=True)


def print_reasons(reasons: Sequence[Reason], assumptions: Sequence[str]) -> None:
    """An explanation: each sentence with its source, and what was assumed."""
    console = Console(highlight=False)
    console = Console(highlight=False, width=min(console.width, WIDTH))
    for reason in reasons:
        console.print(_reason(reason))
    _section(console, "Assumed", assumptions)


def _section(console: Console, head: str, lines: Sequence[str | Text]) -> None:
    if not lines:
        return
    console.print(Text(f"\n{head}", style="bold"))
    mark = "- " if len(lines) > 1 else "  "
    for line in lines:
        row = Table.grid()
        row.add_row(mark, line if isinstance(line, Text) else Text(line))
        console.print(row)


def _reason(reason: Reason) -> Text:
    """The reason, its source in grey."""
    return Text.assemble(reason.text, " ", (f"[{reason.source}]", "dim"))


def _starts(advice: Advice) -> list[str]:
    if advice.learning_rate is None or advice.epochs is None:
        return []
    low_rank = "" if advice.rank is None else f"rank {advice.rank}, alpha {advice.alpha:g}, "
    targets = "" if advice.targets is None else f"{advice.targets}, "
    return [
        f"{low_rank}{targets}learning rate {rate_text(advice.learning_rate)}, "
        f"batch {advice.batch_size}, {counted(advice.epochs, 'epoch')}"
    ]


def _where(console: Console, advice: Advice) -> None:
    """Machines and services side by side, and what each method takes on the own machine."""
    place = advice.where
    if place.own is None and not place.managed:
        return
    _section(console, f"Where: {place.recommended}", [place.text])
    table = Table("", "cost", "time", "", box=None, pad_edge=False)
    owns = {own.machine: own for own in (place.own, place.at_hand, place.cheapest) if own}
    for own in owns.values():
        table.add_row(own.machine, usd_text(own.cost_usd), seconds_text(own.seconds), _note(own))
    for service in place.managed:
        until = f"until {service.self_serve_until}" if service.self_serve_until else ""
        against = "; ".join(filter(None, (until, service.why_not)))
        table.add_row(service.name, usd_text(service.cost_usd), "", against)
    console.print(Padding(table, (0, 0, 0, 2)))
    if advice.plan is not None and place.own is not None:
        lines = [
            f"{name}: {bytes_text(m.peak_process_bytes.low)} to "
            f"{bytes_text(m.peak_process_bytes.high)} a GPU, "
            f"{seconds_text(m.total_s)}, {bytes_text(m.artifact_bytes)} saved, "
            f"{'fits' if m.fits else 'may fit' if m.may_fit else 'does not fit'}"
            for name, m in advice.plan.methods.items()
        ]
        _section(console, f"Each method on {place.own.machine} (predicted, one run)", lines)


def _note(own: Own) -> str:
    at = "at hand" if own.is_at_hand else "cheapest that fits"
    return at if own.fits else f"{at}; does not fit"
