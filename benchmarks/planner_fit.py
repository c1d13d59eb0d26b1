"""The planner's constants for an H200 from the raw file of its grid, and how far it goes wrong.

What was planned where the runs ran, by the PyTorch that ran them, is what is judged.
"""

import json
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.planner_cases import (
    CASES,
    HELD_OUT_FILE,
    build_of,
    config,
    held_out,
    read_case,
)

FIRST_GRID: dict[str, float] = {
    "gemm": 1.145,
    "gemm_int8": 1.44,
    "fused": 1.3,
    "skinny": 1.902,
    "attention": 1.937,
    "masked_attention": 7.459,
    "memory": 2.78,
    "dequantize": 2.0,
    "optimizer": 2.07,
    "eight_bit_s": 3.111e-11,
    "rounding_s": 8.869e-12,
    "host_operation_s": 2.66e-05,
    "host_skinny_s": 1e-04,
    "host_kernel_s": 8e-06,
    "captured_operation_s": 4.5e-06,
    "host_dequantize_s": 3.973e-05,
    "host_update": 0.8146,
    "host_layer_s": 0.0008746,
    "pass_s": 0.001078,
    "step_s": 0.001089,
}
"""What the first grid's 24 runs were fitted to (2026-11-25): where this fit starts and what it is
drawn to. int8 products: the kernel alone, of a layer of 8B (2026-11-27); compiled layers and
captured passes: four runs of an 8B shape beforehand; what LoRA's operators cost the host: a guess
(2026-11-27)."""
_LEAST_TIME_ERROR = 0.15
"""Compiled runs are within 5 %, but were measured on one machine each: no less than what is asked
of a step is claimed."""
KEPT = ("eight_bit_s",)
"""As the first grid had it: no run of this fit updates in 8 bits at the device's pace, and those at
the host's pace must not be explained by it."""


def runs(raw: Path, *, all_lines: bool = False) -> list[Any]:
    """The measured runs, ready to be predicted, by what was traced where they ran: the last of each
    case, its step the mean of those that the case's runs took; `all_lines`: every one by itself."""
    from benchmarks.fitting import Run
    from tunefork.plan import step as tracing
    from tunefork.plan.case import Case as Planned
    from tunefork.plan.catalogue import load_catalogue
    from tunefork.plan.device import target_of
    from tunefork.plan.optimizer import update
    from tunefork.plan.passes import Shape
    from tunefork.plan.shape import count_params, on_meta
    from tunefork.recipe import Method

    target = target_of(load_catalogue().machine(["h200"]))
    measured, planned = read_raw(raw)
    lines = [row for row in _lines(raw) if "planned" not in row and "error" not in row]
    rows = lines if all_lines else list(measured.values())
    found = []
    for row in rows:
        name = row["case"]
        if "error" in row:
            continue
        steps_s = [row["step_s"]]
        if not all_lines:
            steps_s = [line["step_s"] for line in lines if line["case"] == name]
        case = read_case(name)
        made, whole = build_of(case), config(case.shape)
        for there in planned.get(name, []):
            shape = Shape(**there["shape"])
            step = step_from(there["step"])
            if made.method is Method.FULL and not made.releases:
                # What an update starts is counted as it is now.
                weights = list(on_meta(whole, dtype=made.dtype, attention="sdpa").parameters())
                step = replace(step, update=update(weights, made.method, made.full, made.device))
            tracing.keep(whole, made, shape, step)
        found.append(
            Run(
                name=case.name,
                is_held_out=case.held_out,
                case=Planned(whole, count_params(whole), made, target, is_varied=case.packed),
                steps=[[Shape(**shape) for shape in step] for step in row["shapes"]],
                tensor_bytes=row["tensor_bytes"],
                process_bytes=row["process_bytes"],
                context_bytes=row["context_bytes"],
                step_s=fmean(steps_s),
            )
        )
    return found


def read_raw(raw: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last row of each case's run, and what was planned of each; a run beats an error."""
    measured: dict[str, Any] = {}
    planned: dict[str, Any] = {}
    for row in _lines(raw):
        name = row["case"]
        if "planned" in row:
            planned[name] = row["planned"]
        elif "error" not in row or "error" in measured.get(name, {"error": ""}):
            measured[name] = row
    order = [name for name in dict.fromkeys([*CASES, *measured]) if name in measured]
    return {name: measured[name] for name in order}, planned


def _lines(raw: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]


def step_from(fields: dict[str, Any]) -> Any:
    """A `Step` from its fields as JSON holds them."""
    from tunefork.plan.one_pass import Step
    from tunefork.plan.optimizer import Update
    from tunefork.plan.trace import Peak, Work

    found = dict(fields)
    found["peaks"] = {name: Peak(**peak) for name, peak in fields["peaks"].items()}
    found["work"] = {kind: Work(**done) for kind, done in fields["work"].items()}
    found["evaluation"] = fields["evaluation"] and Peak(**fields["evaluation"])
    found["update"] = Update(**fields["update"])
    return Step(**found)


def fit(raw: Path, *, writes: bool = True) -> None:
    """Fit on the cases that are not held out, judge on those that are, write both files."""
    from benchmarks.fitting import (
        fit_memory,
        fit_time,
        process_errors,
        tensor_error,
        time_errors,
        write_fit,
    )
    from benchmarks.results import write
    from tunefork.plan.fits import fit_for, installed, minor

    if HELD_OUT_FILE.read_text(encoding="utf-8").split() != held_out():
        raise SystemExit(f"{HELD_OUT_FILE.name} is not the list that the names' hash chooses")
    lines, _ = read_raw(raw)
    first = next(row for row in lines.values() if "error" not in row)
    measured = [run.traced() for run in runs(raw)]
    software = replace(installed("cuda"), torch=minor(first["versions"]["torch"]))
    start = fit_for("h200", software).fit
    found = start.model_copy(
        update={
            **asdict(software),
            "date": date.fromtimestamp(raw.stat().st_mtime).isoformat(),
            "runs": sum(not run.is_held_out for run in measured),
            "memory": fit_memory(measured, start.memory),
        }
    )
    drawn = {name: value for name, value in FIRST_GRID.items() if name not in KEPT}
    kept = start.time.model_copy(update={name: FIRST_GRID[name] for name in KEPT})
    found = found.model_copy(update={"time": fit_time(measured, kept, drawn)})
    rows = [_judged(run.with_fit(found)) for run in measured]
    for row in rows:
        print(f"{row['case']:34s} {'held out' if row['held_out'] else '':9s} {row['errors']}")
    held = [row for row in rows if row["held_out"]]
    worst_held, worst = _worst(held), _worst(rows)
    # Intervals hold the same run on every machine that ran it.
    every = [_judged(run.traced().with_fit(found)) for run in runs(raw, all_lines=True)]
    memory = {"tensor_error": tensor_error(every, 1000)} | process_errors(every, "process", 1000)
    found = found.model_copy(
        update={
            "memory": found.memory.model_copy(update=memory),
            "time": found.time.model_copy(update=time_errors(every, 1000, _LEAST_TIME_ERROR)),
        }
    )
    judged = {row["case"]: row for row in rows}
    print(f"worst of {len(held)} held out: {worst_held}; of all {len(rows)}: {worst}")
    missing = [name for name in CASES if name not in judged]
    print(f"not measured: {', '.join(missing) or 'none'}")
    if not writes:
        print(found.model_dump_json(indent=1))
        return
    write_fit(found)
    told = (
        "step_s_spread",
        "steps_s",
        "host_operation_s",
        "context_bytes",
        "used_before_bytes",
        "reserved_bytes",
        "losses",
        "error",
    )
    file = write(
        "planner_h200",
        [
            judged.get(name, {"case": name, "held_out": read_case(name).held_out})
            | {key: line[key] for key in told if key in line}
            for name, line in lines.items()
        ],
        device=first["device"],
        command="python benchmarks/planner_h200.py measure; python benchmarks/planner_h200.py fit",
        versions=first["versions"],
    )
    print(file)


def judge(raw: Path) -> None:
    """Print how far the constants as they are go wrong on each run."""
    for row in (_judged(run.traced()) for run in runs(raw)):
        print(f"{row['case']:34s} {row['measured_step_s']:.4f} s {row['errors']}")


def _worst(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative error of each figure."""
    figures = ("tensor", "process", "step")
    return {n: max((abs(row["errors"].get(n, 0.0)) for row in rows), default=0.0) for n in figures}


def _judged(run: Any) -> dict[str, Any]:
    predicted = {
        "tensor_bytes": run.predicted_tensor_bytes(),
        "process_bytes": run.predicted_process_bytes(),
        "step_s": run.predicted_step_s(),
    }
    predicted = {name: value for name, value in predicted.items() if getattr(run, name) is not None}
    row: dict[str, Any] = {"case": run.name, "held_out": run.is_held_out, "kind": run.kind}
    for name, value in predicted.items():
        row[f"predicted_{name}"] = value
        row[f"measured_{name}"] = getattr(run, name)
    if run.kind == "error_captured_varied":
        row["launched_step_s"] = run.predicted_step_s(is_launched=True)
    row["errors"] = {
        name.partition("_")[0]: round(value / getattr(run, name) - 1, 4)
        for name, value in predicted.items()
    }
    return row
