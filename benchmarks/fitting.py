"""Fit the planner's constants to measured short runs; what `benchmarks/planner_*.py` share.

Memory: the workspace is what is measured beyond the traced tensors (median), and what the allocator
holds without using it is linear in seven traced sizes (least squares on relative errors). Time: the
factors of `plan.time`, by a pattern search over their logarithms, with a robust loss on that
of predicted over measured, drawn towards plain roofline values where the runs say little.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel

from tunefork.plan.case import Case
from tunefork.plan.fits import Fit, MemoryFit, TimeFit
from tunefork.plan.method import one_pass_seconds
from tunefork.plan.passes import Shape
from tunefork.plan.short_run import WARM_UP
from tunefork.plan.time import update_seconds

FITS = Path(__file__).parent.parent / "src/tunefork/plan/fits.yaml"
_Model = TypeVar("_Model", bound=BaseModel)
KEY = ("device", "torch", "attention", "quantizer")
PRIOR: dict[str, float] = {
    "gemm": 1.5,
    "skinny": 2.0,
    "attention": 2.5,
    "masked_attention": 5.0,
    "memory": 1.3,
    "dequantize": 2.0,
    "optimizer": 1.3,
    "eight_bit_s": 1e-11,
    "rounding_s": 1e-11,
    "host_operation_s": 2e-5,
    "host_skinny_s": 1e-4,
    "host_dequantize_s": 5e-5,
    "host_update": 1.0,
    "host_layer_s": 3e-4,
    "pass_s": 1e-3,
    "step_s": 1e-3,
}
"""Where a fit starts and what it is drawn to: rates of well-tuned libraries on a large GPU."""
_PULL = 3e-2
"""Weight of a squared distance from the prior, in the logarithm, beside the mean loss of a run."""
_SCALE = 0.05
"""Errors beyond this count by their size, no longer by its square."""


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run."""

    name: str
    is_held_out: bool
    case: Case
    steps: Sequence[Sequence[Shape]]
    """Of each step's forward passes."""
    tensor_bytes: int | None
    process_bytes: int
    context_bytes: int | None
    step_s: float | None
    """None where the run was measured for its memory."""
    work: Any = None
    """The timed steps' passes, traced, and the optimiser's update; filled by `traced`."""
    update: Any = None

    def traced(self) -> "Run":
        """The same with its work at hand."""
        work = [[(self.case.step(shape), shape) for shape in step] for step in self.steps[WARM_UP:]]
        known = self.case.step(self.steps[0][0]).update
        return replace(self, work=work, update=known)

    def with_fit(self, fit: Fit) -> "Run":
        """The same, to be predicted by `fit`."""
        target = replace(self.case.target, fit=fit)
        return replace(self, case=replace(self.case, target=target))

    @property
    def largest(self) -> Shape:
        """The pass that takes the most memory."""
        shapes = sorted(
            {shape for step in self.steps for shape in step}, key=lambda s: -s.rows * s.length
        )
        return max(shapes[:3], key=lambda shape: self.case.step(shape).peak.total)

    @property
    def form(self) -> tuple[bool, bool]:
        """Whether its passes are captured, and whether they are of many lengths."""
        step = self.case.step(self.largest)
        return self.case.captures(step, self.largest), self.case.is_varied

    @property
    def kind(self) -> str:
        """By which error of a `TimeFit` its step is judged; the factors are of the first two."""
        if self.form == (True, True):
            return "error_captured_varied"
        is_offloaded = self.case.made.checkpointing == "offload" and self.case.target.kind == "cuda"
        if is_offloaded:
            return "error_offloaded"
        return "error" if self.case.made.is_compiled else "error_launched"

    def predicted_step_s(self, *, is_launched: bool = False) -> float:
        """Median over the steps, as the measured figure is; `is_launched`: of captured ones too."""
        target, case = self.case.target, self.case.launched if is_launched else self.case
        update = update_seconds(self.update, target.rates, target.fit.time)
        return update + statistics.median(
            sum(one_pass_seconds(case, found, found.work, shape) for found, shape in step)
            for step in self.work
        )

    def predicted_tensor_bytes(self) -> float:
        """Peak."""
        return self.case.memory(self.largest).tensors.mid

    def predicted_process_bytes(self) -> float:
        """Peak."""
        return self.case.memory(self.largest).process.mid


def fit_memory(runs: Sequence[Run], start: MemoryFit) -> MemoryFit:
    """Constants of memory from the runs that are not held out."""
    runs = [
        run.with_fit(_with(run.case.target.fit, memory=replace_model(start, _NOTHING)))
        for run in runs
        if not run.is_held_out
    ]
    contexts = [run.context_bytes for run in runs if run.context_bytes is not None]
    context = statistics.median(contexts) if contexts else 0.0
    workspace = 0.0
    if all(run.tensor_bytes is not None for run in runs):
        workspace = statistics.median(
            (run.tensor_bytes or 0) - run.predicted_tensor_bytes() for run in runs
        )
    rows, wanted = [], []
    for run in runs:
        step = run.case.step(run.largest)
        peak = run.predicted_tensor_bytes() + workspace
        dynamic = max(0.0, peak - sum(step.static.values()))
        is_recomputed = run.case.made.checkpointing != "none"
        sizes = [
            1.0,
            0.0 if is_recomputed else dynamic,
            dynamic if is_recomputed else 0.0,
            float(step.update.room_bytes),
            *(dynamic if form == run.form else 0.0 for form in _FORMS),
        ]
        rows.append([size / run.process_bytes for size in sizes])
        wanted.append((run.process_bytes - peak - context) / run.process_bytes)
    held = _non_negative(np.array(rows), np.array(wanted))
    return replace_model(
        start,
        {
            "workspace_bytes": workspace,
            "context_bytes": context,
            "held_constant_bytes": held[0],
            "held_per_dynamic": held[1],
            "held_per_recomputed": held[2],
            "held_per_room": held[3],
            "held_per_captured": held[4],
            "held_per_varied": held[5],
            "held_per_captured_varied": held[6],
        },
    )


_NOTHING = {
    "workspace_bytes": 0.0,
    "context_bytes": 0.0,
    "held_constant_bytes": 0.0,
    "held_per_dynamic": 0.0,
    "held_per_recomputed": 0.0,
    "held_per_room": 0.0,
    "held_per_captured": 0.0,
    "held_per_varied": 0.0,
    "held_per_captured_varied": 0.0,
}
_FORMS = ((True, False), (False, True), (True, True))
"""Whether passes are captured, and of many lengths, for each of the last three."""


def _non_negative(rows: Any, wanted: Any) -> list[float]:
    """Least squares with no negative factor: those that would be are left out, one by one."""
    active = list(range(rows.shape[1]))
    while True:
        found = np.linalg.lstsq(rows[:, active], wanted, rcond=None)[0]
        if (found >= 0).all():
            full = np.zeros(rows.shape[1])
            full[active] = found
            return [float(value) for value in full]
        active.pop(int(found.argmin()))


_FITTED = ("error", "error_launched")
"""Kinds of steps that the factors of time are fitted to."""


def fit_time(runs: Sequence[Run], start: TimeFit, prior: Mapping[str, float] = PRIOR) -> TimeFit:
    """Factors of time from the runs that are not held out."""
    fitted = [run for run in runs if not run.is_held_out and run.kind in _FITTED]
    timed = [(run, run.step_s) for run in fitted if run.step_s]
    values = {name: math.log(value) for name, value in prior.items()}

    def loss(candidate: dict[str, float]) -> float:
        fit = replace_model(start, {name: math.exp(value) for name, value in candidate.items()})
        total = 0.0
        for run, step_s in timed:
            there = run.with_fit(_with(run.case.target.fit, time=fit))
            error = math.log(there.predicted_step_s() / step_s)
            total += math.sqrt(1 + (error / _SCALE) ** 2) - 1
        pull = sum((value - math.log(prior[name])) ** 2 for name, value in candidate.items())
        return total / len(timed) + _PULL * pull

    best = loss(values)
    for size in (2.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.015):
        improved = True
        while improved:
            improved = False
            for name in values:
                for change in (size, -size):
                    candidate = values | {name: values[name] + change}
                    found = loss(candidate)
                    if found < best - 1e-9:
                        best, values, improved = found, candidate, True
    return replace_model(
        start, {name: float(f"{math.exp(value):.4g}") for name, value in values.items()}
    )


def replace_model(model: _Model, changes: dict[str, Any]) -> _Model:
    """A frozen pydantic model with some fields changed."""
    return model.model_copy(update=changes)


def _with(fit: Fit, **changes: Any) -> Fit:
    return replace_model(fit, changes)


def tensor_error(rows: list[dict[str, Any]], steps: int) -> float:
    """How far from its prediction, relative to that, any run's tensors were: rounded up to 1 /
    `steps`, at least one per cent."""
    ratios = [row["measured_tensor_bytes"] / row["predicted_tensor_bytes"] for row in rows]
    worst = float(max(abs(ratio - 1) for ratio in ratios))
    return max(0.01, math.ceil(steps * worst) / steps)


def process_errors(rows: list[dict[str, Any]], figure: str, steps: int) -> dict[str, float]:
    """How much less and more than predicted a process took: some bytes, and relative to what was
    predicted what they leave, rounded up to 1 / `steps`, at least one per cent. Of the ways to
    divide it that hold every run, the one with the narrowest intervals, on average."""
    name = figure.removesuffix("_bytes")
    pairs = [
        (row[f"measured_{name}_bytes"], row[f"predicted_{name}_bytes"])
        for row in rows
        if f"measured_{name}_bytes" in row
    ]
    found = {}
    for side, sign in (("less", -1), ("more", 1)):
        ways = []
        for size in range(0, 2**30, 2**24):
            left = max((sign * (took - predicted) - size) / predicted for took, predicted in pairs)
            share = max(0.01, math.ceil(steps * left) / steps)
            width = share + statistics.mean(size / predicted for _, predicted in pairs)
            ways.append((width, share, float(size)))
        _, found[f"process_{side}"], found[f"process_{side}_bytes"] = min(ways)
    return found


def time_errors(rows: list[dict[str, Any]], steps: int, least: float = 0.01) -> dict[str, float]:
    """The largest error of each kind of step, rounded up to 1 / `steps`, at least `least`."""
    found = dict.fromkeys([*_FITTED, "error_offloaded", "error_captured_varied"], least)
    for row in rows:
        if "step" in row["errors"]:
            measured, least = row["measured_step_s"], row["predicted_step_s"]
            most = max(least, row.get("launched_step_s", least))
            worst = math.ceil(steps * (max(measured / most, least / measured) - 1)) / steps
            found[row["kind"]] = max(found[row["kind"]], worst)
    # A kind of which no run was measured is as far off as any.
    return {kind: max(error, found["error"]) for kind, error in found.items()}


def write_fit(fit: Fit) -> None:
    """Put `fit` in the place of the entry of its device and software in fits.yaml."""
    rows = yaml.safe_load(FITS.read_text(encoding="utf-8")) if FITS.exists() else []
    entry = fit.model_dump()
    others = [row for row in rows if any(row[name] != entry[name] for name in KEY)]
    text = yaml.safe_dump([*others, entry], sort_keys=False)
    FITS.write_text(
        f"# Written by benchmarks/planner_*.py; see fits.py for what each means.\n{text}",
        encoding="utf-8",
    )
