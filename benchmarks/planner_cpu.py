"""The planner on a CPU beside what runs really take: memory of the process, time of a step.

Each case is a real training run (random weights, random tokens, every token supervised) in a
process of its own. A third of the cases, chosen by a hash of their names, is held out from the fit.

    python benchmarks/planner_cpu.py        about five minutes on 2 cores

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
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.fitting import Run, fit_memory, fit_time, write_fit
from benchmarks.results import write
from tunefork.model.device import describe, pick_dtype
from tunefork.plan.built import Build
from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import here
from tunefork.plan.fits import fit_for, installed, minor
from tunefork.plan.method import Case
from tunefork.plan.passes import Shape
from tunefork.plan.shape import config_for, count_params
from tunefork.plan.short_run import WARM_UP, short_run
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
STEPS = 6


def build_of(name: str) -> Build:
    """How the planner describes a case's model."""
    return Build(
        method=Method(name.split("-")[1]),
        lora=LoraSection(),
        full=FullSection(),
        dtype=pick_dtype("auto", CPU),
        checkpointing="full" if name.endswith("ckpt") else "none",
        device="cpu",
    )


def lengths(name: str) -> tuple[list[list[int]], int]:
    """Tokens of each step's examples, and most tokens of a pass."""
    rows, length = map(int, name.split("-")[2].split("x"))
    step = [length // 4, length // 2, length // 5] * rows if "packed" in name else [length] * rows
    return [step] * (WARM_UP + STEPS), rows * length


def measure(name: str) -> dict[str, Any]:
    """One case, in this process."""
    steps, most = lengths(name)
    config = config_for(SIZES[name.split("-")[0]])
    packing = "packed" in name
    run = short_run(
        config, build_of(name), steps, micro_batch_tokens=most, packing=packing, device=CPU
    )
    return asdict(run)


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


def main() -> None:
    """Measure in processes of their own, fit, judge, write."""
    raw: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as home:
        for name in CASES:
            command = [sys.executable, __file__, name]
            environment = os.environ | {"TUNEFORK_HOME": home}
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            ).stdout
            raw[name] = json.loads(output.strip().splitlines()[-1])
            print(f"{name:24s} {raw[name]['step_s']:.3f} s", flush=True)
    flops, bandwidth = rates()
    device = describe(CPU)
    start = fit_for("cpu", installed("cpu")).fit
    start = start.model_copy(
        update={
            "name": f"{device['name']}, {device['threads']} cores",
            "torch": minor(torch.__version__),
            "date": datetime.now(UTC).date().isoformat(),
            "runs": sum(not held_out(name) for name in CASES),
            "flops": float(f"{flops:.3g}"),
            "bandwidth": float(f"{bandwidth:.3g}"),
        }
    )
    target = replace(
        here(load_catalogue(), is_corrected=False),
        fit=start,
        rates=Rates(start.flops or flops, start.bandwidth or bandwidth),
    )
    runs = []
    for name, row in raw.items():
        config = config_for(SIZES[name.split("-")[0]])
        runs.append(
            Run(
                name=name,
                is_held_out=held_out(name),
                case=Case(config, count_params(config), build_of(name), target),
                steps=[[Shape(**shape) for shape in step] for step in row["shapes"]],
                tensor_bytes=None,
                process_bytes=row["process_bytes"],
                context_bytes=None,
                step_s=row["step_s"],
            ).traced()
        )
    found = start.model_copy(update={"memory": fit_memory(runs, start.memory)})
    found = found.model_copy(update={"time": fit_time(runs, start.time)})
    rows = []
    for run in (run.with_fit(found) for run in runs):
        predicted = {
            "process_bytes": run.predicted_process_bytes(),
            "step_s": run.predicted_step_s(),
        }
        row = {"case": run.name, "held_out": run.is_held_out}
        for figure, value in predicted.items():
            row |= {f"predicted_{figure}": value, f"measured_{figure}": getattr(run, figure)}
        row["errors"] = {f: round(v / getattr(run, f) - 1, 4) for f, v in predicted.items()}
        row["step_s_spread"] = raw[run.name]["step_s_spread"]
        rows.append(row)
        print(f"{run.name:24s} {'held out' if run.is_held_out else '':9s} {row['errors']}")
    worst = {f: max(abs(row["errors"][f]) for row in rows) for f in ("process_bytes", "step_s")}
    errors = {"process_error": _up(worst["process_bytes"]), "tensor_error": 0.05}
    found = found.model_copy(
        update={
            "memory": found.memory.model_copy(update=errors),
            "time": found.time.model_copy(update={"error": _up(worst["step_s"])}),
        }
    )
    write_fit(found)
    print(worst, write("planner_cpu", rows, device=found.name))


def _up(error: float) -> float:
    return max(1, math.ceil(100 * error)) / 100


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
