"""The planner on a CPU beside what runs really take: memory of the process, time of a step.

Each case is a real training run (random weights, random tokens, every token supervised) in a
process of its own. A third of the cases, chosen by a hash of their names, is held out from the fit.
Steps of one length are timed. Those of many, as real data have, are for memory, of which they take
more: what the allocator cut for one length does not suit the next.

    python benchmarks/planner_cpu.py            about ten minutes on 2 cores
    python benchmarks/planner_cpu.py memory     measures the varied cases alone, which a busy
                                                machine does not disturb; the others' figures are
                                                those of the results' file
    python benchmarks/planner_cpu.py fit        measures nothing

Writes src/tunefork/plan/fits.yaml (the CPU's entry) and results/planner_cpu.json.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.fitting import PRIOR, Run, fit_memory, fit_time, process_errors, write_fit
from benchmarks.results import FOLDER, write
from tunefork.model.device import describe, pick_dtype
from tunefork.plan.built import Build
from tunefork.plan.case import Case
from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import here
from tunefork.plan.fits import Fit, fit_for, installed, minor
from tunefork.plan.shape import config_for, count_params
from tunefork.plan.short_run import WARM_UP, examples_of, shapes_of, short_run
from tunefork.plan.time import Rates
from tunefork.recipe import FullSection, LoraSection, Method

CPU = torch.device("cpu")
SIZES = {"135m": 0.1345e9, "360m": 0.3618e9}
CASES = [
    f"{size}-{method}-{batch}"
    for size in SIZES
    for method in ("lora", "qlora", "full")
    for batch in ("2x128", "4x256", "4x256-packed", "2x256-ckpt")
    if size == "135m" or batch in ("2x128", "4x256-packed")
]
VARIED = [
    f"{size}-{method}-{batch}-varied"
    for size in SIZES
    for method in ("lora", "qlora", "full")
    for batch in ("4x128", "4x128-ckpt")
    if size == "135m" or batch == "4x128"
]
TIMES = {name: value for name, value in PRIOR.items() if name != "host_update"}
"""What is fitted of time. The models have 272 and 290 tensors: nothing here tells what it costs to
start their updates from the bytes that these move, so it costs what starting anything does."""
STEPS, STEPS_VARIED = 6, 16


def build_of(name: str) -> Build:
    """How the planner describes a case's model."""
    return Build(
        method=Method(name.split("-")[1]),
        lora=LoraSection(),
        full=FullSection(),
        dtype=pick_dtype("auto", CPU),
        checkpointing="full" if "ckpt" in name else "none",
        device="cpu",
    )


def lengths(name: str) -> tuple[list[list[int]], int]:
    """Tokens of each step's examples, and most tokens of a pass."""
    rows, length = map(int, name.split("-")[2].split("x"))
    if name in VARIED:
        draw = np.random.default_rng(0)
        return draw.integers(length // 3, length + 1, (STEPS_VARIED, rows)).tolist(), rows * length
    step = [length // 4, length // 2, length // 5] * rows if "packed" in name else [length] * rows
    return [step] * (WARM_UP + STEPS), rows * length


def measure(name: str) -> dict[str, Any]:
    """One case, in this process."""
    steps, most = lengths(name)
    run = short_run(
        config_of(name),
        build_of(name),
        steps,
        micro_batch_tokens=most,
        packing=is_packed(name),
        device=CPU,
    )
    found: dict[str, Any] = {"process_bytes": run.process_bytes}
    if name not in VARIED:
        found |= {"step_s": run.step_s, "step_s_spread": run.step_s_spread}
    return found


def config_of(name: str) -> Any:
    """The case's model."""
    return config_for(SIZES[name.split("-")[0]])


def is_packed(name: str) -> bool:
    """Whether several examples share a row."""
    return "packed" in name or name in VARIED


def held_out(name: str) -> bool:
    """Chosen before anything was measured."""
    return hashlib.sha256(name.encode()).digest()[0] % 3 == 0


def rates() -> tuple[float, float]:
    """Operations a second of a large bf16 product, and bytes a second of a large copy."""
    size = 2048
    a = torch.randn(size, size, dtype=pick_dtype("auto", CPU))
    wide = torch.empty(2**28, dtype=torch.uint8)
    return 2 * size**3 / _best(lambda: a @ a), 2 * wide.numel() / _best(wide.clone)


def _best(work: Any) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(cases: list[str]) -> None:
    """Measure `cases` in processes of their own, fit, judge, write."""
    is_all = cases == [*CASES, *VARIED]
    raw = {} if is_all else measured_before()
    with tempfile.TemporaryDirectory() as home:
        for name in cases:
            command = [sys.executable, __file__, "case", name]
            environment = os.environ | {"TUNEFORK_HOME": home}
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            ).stdout
            raw[name] = json.loads(output.strip().splitlines()[-1])
            print(f"{name:26s} {raw[name]}", flush=True)
    start = fit_for("cpu", installed("cpu")).fit
    start = of_this_machine(start) if is_all else start
    start = start.model_copy(update={"time": start.time.model_copy(update={"host_update": 1.0})})
    runs = planned(raw, start)
    found = start.model_copy(
        update={
            "date": datetime.now(UTC).date().isoformat(),
            "runs": sum(not held_out(name) for name in raw),
            "memory": fit_memory(runs, start.memory),
        }
    )
    runs = [run if run.step_s is None else run.traced() for run in runs]
    found = found.model_copy(update={"time": fit_time(runs, start.time, TIMES)})
    judge(runs, raw, found)


def measured_before() -> dict[str, dict[str, Any]]:
    """The figures of the results' file."""
    file = FOLDER / "planner_cpu.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {
        row["case"]: {
            name.removeprefix("measured_"): row[name]
            for name in ("measured_process_bytes", "measured_step_s", "step_s_spread")
            if name in row
        }
        for row in rows
    }


def of_this_machine(start: Fit) -> Fit:
    """`start` with the name and the rates of the machine at hand."""
    flops, bandwidth = rates()
    device = describe(CPU)
    return start.model_copy(
        update={
            "name": f"{device['name']}, {device['threads']} cores",
            "torch": minor(torch.__version__),
            "flops": float(f"{flops:.3g}"),
            "bandwidth": float(f"{bandwidth:.3g}"),
        }
    )


def planned(raw: dict[str, dict[str, Any]], start: Fit) -> list[Run]:
    """The runs, ready to be predicted."""
    assert start.flops is not None and start.bandwidth is not None
    target = replace(
        here(load_catalogue(), is_corrected=False),
        fit=start,
        rates=Rates(start.flops, start.bandwidth),
    )
    runs = []
    for name, row in raw.items():
        config, (steps, most) = config_of(name), lengths(name)
        examples, taken = examples_of(steps, config.vocab_size)
        case = Case(config, count_params(config), build_of(name), target, name in VARIED)
        runs.append(
            Run(
                name=name,
                is_held_out=held_out(name),
                case=case,
                steps=shapes_of(examples, taken, most, is_packed(name)),
                tensor_bytes=None,
                process_bytes=row["process_bytes"],
                context_bytes=None,
                step_s=row.get("step_s"),
            )
        )
    return runs


def judge(runs: list[Run], raw: dict[str, dict[str, Any]], found: Fit) -> None:
    """Predict every run by `found`, and write it with the worst errors, and the results."""
    rows = []
    for run in (run.with_fit(found) for run in runs):
        predicted = {"process_bytes": run.predicted_process_bytes()}
        if run.step_s is not None:
            predicted["step_s"] = run.predicted_step_s()
        row: dict[str, Any] = {"case": run.name, "held_out": run.is_held_out, "errors": {}}
        for figure, value in predicted.items():
            row |= {f"predicted_{figure}": value, f"measured_{figure}": getattr(run, figure)}
            row["errors"][figure] = round(value / getattr(run, figure) - 1, 4)
        rows.append(row | {k: v for k, v in raw[run.name].items() if k == "step_s_spread"})
        print(f"{run.name:26s} {'held out' if run.is_held_out else '':9s} {row['errors']}")
    memory = {"tensor_error": 0.05} | process_errors(rows, "process_bytes", 100)
    time = {"error": _up(max(abs(row["errors"].get("step_s", 0.0)) for row in rows))}
    found = found.model_copy(
        update={
            "memory": found.memory.model_copy(update=memory),
            "time": found.time.model_copy(update=time),
        }
    )
    write_fit(found)
    print(write("planner_cpu", rows, device=found.name))


def _up(error: float) -> float:
    return max(1, math.ceil(100 * error)) / 100


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main({"memory": VARIED, "fit": []}.get("".join(sys.argv[1:]), [*CASES, *VARIED]))
