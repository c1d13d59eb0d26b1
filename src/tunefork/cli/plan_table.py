"""A plan on the terminal: the methods side by side."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from tunefork.page.units import (
    bytes_text,
    count_text,
    counted,
    seconds_text,
    share_text,
    usd_text,
)
from tunefork.plan.schema import Interval, MethodPlan, Plan

_NAMES = {"lora": "LoRA", "qlora": "QLoRA", "full": "full"}
_PHASES = {
    "load": "load",
    "forward_backward": "forward, backward",
    "optimizer": "optimiser step",
    "evaluate": "evaluation",
    "save": "save",
}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print `plan`."""
    console = console or Console()
    machine = plan.machine
    price = "" if machine.usd_per_hour is None else f", {usd_text(machine.usd_per_hour)} an hour"
    console.print(
        f"{plan.model} ({count_text(plan.total_params)} parameters) on {machine.count} x "
        f"{machine.gpu}, {bytes_text(machine.memory_bytes)} each{price}",
        highlight=False,
        soft_wrap=True,
    )
    work = plan.work
    mask = ", several examples a row" if work.is_masked else ""
    console.print(
        f"{counted(work.examples, 'example')}, {count_text(work.tokens)} tokens, "
        f"{counted(work.epochs, 'epoch')}: {counted(work.steps, 'step')} of "
        f"{counted(work.batch_size, 'example')}; largest pass {work.rows} x "
        f"{work.length} tokens{mask}\n",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("predicted", *(_NAMES[name] for name in plan.methods), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, text in _ROWS.items():
        table.add_row(name, *(text(method) for method in plan.methods.values()))
    console.print(table)
    for name, method in plan.methods.items():
        if method.next_option:
            console.print(
                f"\n{_NAMES[name]} does not fit. It would with {method.next_option}",
                highlight=False,
                soft_wrap=True,
            )
    console.print()
    for note in plan.notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True, style="dim")


def _fits(method: MethodPlan) -> str:
    if method.fits:
        return f"yes, {bytes_text(method.margin_bytes)} left"
    return "perhaps" if method.may_fit else "no"


def _range(interval: Interval) -> str:
    return f"{bytes_text(interval.mid)} {_around(interval.low, interval.mid, interval.high)}"


def _around(low: float, mid: float, high: float) -> str:
    """`± 4 %`, or `-11/+3 %` where the ends are not alike."""
    less, more = share_text(1 - low / mid, 0), share_text(high / mid - 1, 0)
    return f"± {more}" if less == more else f"-{less.removesuffix(' %')}/+{more}"


def _phase(name: str) -> Callable[[MethodPlan], str]:
    def text(method: MethodPlan) -> str:
        return bytes_text(next(p.tensor_bytes for n, p in method.phases.items() if n == name))

    return text


def _part(name: str) -> Callable[[MethodPlan], str]:
    def text(method: MethodPlan) -> str:
        peak = max(method.phases.values(), key=lambda phase: phase.tensor_bytes)
        return bytes_text(next((size for part, size in peak.parts.items() if part == name), 0))

    return text


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else seconds_text(seconds)


def _tokens(count: int | None) -> str:
    return "none fits" if count is None else f"{count:,} tokens"


_ROWS: dict[str, Callable[[MethodPlan], str]] = {
    "fits": _fits,
    "peak memory (process)": lambda method: _range(method.peak_process_bytes),
    "peak memory (tensors)": lambda method: _range(method.peak_tensor_bytes),
    **{f"  {words}": _phase(name) for name, words in _PHASES.items()},
    **{
        f"  {part} at the peak": _part(part)
        for part in ("weights", "gradients", "optimizer", "activations", "logits", "workspace")
    },
    "activation checkpointing": lambda method: method.activation_checkpointing,
    "parameters trained": lambda method: (
        f"{count_text(method.trainable_params)} "
        f"({share_text(method.trainable_params / method.total_params, 2)})"
    ),
    "one step": lambda method: (
        f"{_short(method.step_s)} "
        f"{_around(method.step_s_interval[0], method.step_s, method.step_s_interval[1])}"
    ),
    "training": lambda method: seconds_text(method.total_s),
    "tokens a second": lambda method: f"{method.tokens_per_s:,.0f}",
    "cost": lambda method: "-" if method.cost_usd is None else usd_text(method.cost_usd),
    "artefact": lambda method: bytes_text(method.artifact_bytes),
    "largest pass": lambda method: _tokens(method.largest_micro_batch_tokens),
    "longest sequence": lambda method: _tokens(method.largest_length),
}
