"""The figures that the rules' texts name in braces, each written for people.

A text is filled by `str.format_map(Figures(facts))`, so only the figures that it names are made:
some need a plan.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tunefork.advise.capacity import BITS_PER_TOKEN, RANKS, capacity_tokens
from tunefork.advise.estimate import Placed, machine_text, size_text
from tunefork.advise.facts import FULL_LEAST_USD, FULL_RUNS, Facts
from tunefork.page.units import (
    bytes_text,
    count_text,
    counted,
    rate_text,
    seconds_text,
    usd_text,
)
from tunefork.recipe import Method


def _seconds(seconds: float) -> str:
    """`5.2 h`, `12 days`"""
    if seconds == float("inf"):
        return "no time that could be stated"
    return seconds_text(seconds) if seconds < 48 * 3600 else f"{seconds / 86400:,.0f} days"


def _cost(facts: Facts, method: Method) -> str:
    cost = facts.cost_usd(method)
    return "more than eight GPUs of the catalogue" if cost == float("inf") else usd_text(cost)


def _where(placed: Placed | None) -> str:
    return "no machine of up to eight GPUs" if placed is None else machine_text(placed.machine)


def _peak(facts: Facts, method: Method) -> str:
    here = facts.estimates.here(method) or facts.best(method)
    if here is None:
        return "unknown"
    if here.smaller_tokens is not None:
        memory = bytes_text(here.machine.gpu.usable_bytes)
        return f"up to {memory} (in micro-batches of {here.smaller_tokens} tokens)"
    return bytes_text(here.figures.peak_process_bytes.high)


def _memory(facts: Facts) -> str:
    machine = facts.estimates.at_hand
    return "no limit" if machine is None else bytes_text(machine.gpu.usable_bytes)


def _artifact(facts: Facts, method: Method) -> float:
    placed = facts.estimates.here(method) or facts.best(method)
    if placed is None:
        return 2.0 * facts.params
    return float(placed.figures.artifact_bytes)


def _capacity(facts: Facts, rank: int) -> str:
    return count_text(capacity_tokens(facts.estimates.planner, rank))


def _budget(facts: Facts) -> str:
    return "none" if facts.situation.budget_usd is None else usd_text(facts.situation.budget_usd)


def _worth(facts: Facts) -> str:
    value = facts.situation.quality_point_value_usd
    return "not said" if value is None else usd_text(value)


def _extra_why(facts: Facts) -> str:
    """`about $12,400 more`, or the floor and that it is one: GPU time alone may cost a dollar."""
    text = usd_text(facts.full_extra_usd)
    if facts.full_extra_usd > FULL_LEAST_USD:
        return f"about {text} more"
    return f"at least {text} more (rule of thumb 7, with the work around the runs)"


def _measured(facts: Facts) -> str:
    return "" if facts.experience is None else facts.experience.text


TABLE: dict[str, Callable[[Facts], str]] = {
    "params": lambda f: size_text(f.params),
    "examples": lambda f: f"{f.amount.examples:,}",
    "tokens": lambda f: count_text(f.amount.tokens),
    "supervised": lambda f: count_text(f.amount.supervised_tokens),
    "bits": lambda f: count_text(f.amount.supervised_tokens * BITS_PER_TOKEN),
    "steps": lambda f: counted(f.amount.steps, "step"),
    "batch": lambda f: str(f.amount.batch_size),
    "rank": lambda f: str(f.rank),
    "rank_needed": lambda f: f"above {RANKS[-1]}" if f.rank_needed is None else str(f.rank_needed),
    "delta": lambda f: count_text(f.estimates.planner.lora_params(f.rank)),
    "epochs": lambda f: counted(f.amount.epochs, "epoch"),
    "capacity": lambda f: _capacity(f, f.rank),
    "most": lambda f: _capacity(f, RANKS[-1]),
    "tenants": lambda f: f"{f.tenants:,}",
    "adapter": lambda f: bytes_text(_artifact(f, Method.LORA)),
    "adapters": lambda f: bytes_text(_artifact(f, Method.LORA) * f.tenants),
    "model": lambda f: bytes_text(_artifact(f, Method.FULL)),
    "models": lambda f: bytes_text(_artifact(f, Method.FULL) * f.tenants),
    "share": lambda f: f"{100 * f.estimates.planner.lora_params(f.rank) / f.params:.2g} %",
    "worth": _worth,
    "extra": lambda f: usd_text(f.full_extra_usd),
    "extra_why": _extra_why,
    "runs": lambda f: str(FULL_RUNS),
    "budget": _budget,
    "deadline": lambda f: f"{f.situation.deadline_hours or 0:g} h",
    "lora_cost": lambda f: _cost(f, Method.LORA),
    "qlora_cost": lambda f: _cost(f, Method.QLORA),
    "full_cost": lambda f: _cost(f, Method.FULL),
    "lora_time": lambda f: _seconds(f.seconds(Method.LORA)),
    "qlora_time": lambda f: _seconds(f.seconds(Method.QLORA)),
    "full_time": lambda f: _seconds(f.seconds(Method.FULL)),
    "lora_where": lambda f: _where(f.best(Method.LORA)),
    "qlora_where": lambda f: _where(f.best(Method.QLORA)),
    "full_where": lambda f: _where(f.best(Method.FULL)),
    "lora_cheapest": lambda f: _where(f.estimates.cheapest(Method.LORA)),
    "qlora_cheapest": lambda f: _where(f.estimates.cheapest(Method.QLORA)),
    "full_cheapest": lambda f: _where(f.estimates.cheapest(Method.FULL)),
    "lora_peak": lambda f: _peak(f, Method.LORA),
    "qlora_peak": lambda f: _peak(f, Method.QLORA),
    "full_peak": lambda f: _peak(f, Method.FULL),
    "memory": _memory,
    "gpus": lambda f: _where(f.estimates.here(Method.LORA)),
    "measured": _measured,
    "folder": lambda f: "" if f.experience is None else str(f.experience.folder),
    "lora_rate": lambda f: rate_text(f.learning_rate(Method.LORA)),
    "full_rate": lambda f: rate_text(f.learning_rate(Method.FULL)),
}
"""Name in braces -> how it is made."""


@dataclass(frozen=True, slots=True)
class Figures:
    """`TABLE` for one situation, as `str.format_map` wants it."""

    facts: Facts

    def __getitem__(self, name: str) -> str:
        return TABLE[name](self.facts)


def fill(text: str, facts: Facts) -> str:
    """`text` with its figures; KeyError for one that `TABLE` does not know."""
    return text.format_map(Figures(facts))
