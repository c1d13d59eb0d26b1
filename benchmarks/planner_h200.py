"""The planner beside what runs really take: peak tensor memory, process memory, time of a step.

Each case (`planner_cases.py`) is a real training run, with random weights and tokens and every
token supervised, by the code that `tunefork train` runs.

    python benchmarks/planner_h200.py hold-out                    writes the list of those held out
    python benchmarks/planner_h200.py measure --out RAW.jsonl     on the GPU, 5 to 8 minutes
    python benchmarks/planner_h200.py fit RAW.jsonl               anywhere: fits, writes the results

`measure` appends a line a case as it goes, and goes on with what is missing when called again.
First it compiles all cases side by side, on models of two layers, into PyTorch's cache on the disk,
and plans each one there, with the very PyTorch that will run it; then it runs one after the other.

`fit` writes src/tunefork/plan/fits.yaml (what the planner uses) and results/planner_h200.json.
"""

import argparse
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.planner_cases import (
    CASES,
    HELD_OUT_FILE,
    SHAPES,
    Case,
    build_of,
    config,
    held_out,
    lengths,
    read_case,
)

FIRST_GRID: dict[str, float] = {
    "gemm": 1.145,
    "gemm_fp8": 1.52,
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
    "host_kernel_s": 8e-06,
    "captured_operation_s": 4.5e-06,
    "host_dequantize_s": 3.973e-05,
    "host_update": 0.8146,
    "host_layer_s": 0.0008746,
    "pass_s": 0.001078,
    "step_s": 0.001089,
}
"""What the first grid's 24 runs were fitted to (2026-11-25): where this fit starts and what it is
drawn to. FP8 products, compiled layers and captured passes: four runs of an 8B shape beforehand."""
_SIDE_BY_SIDE = 8
"""Processes that compile at the same time."""
_MOST_S = {"prepare": 150.0, "run": 100.0}
"""For one case."""
_SHARE_TO_PREPARE = 0.4
"""Of the time given: what is not compiled by then is compiled in its own run."""
_ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/planner_h200_cache",
    "TORCHINDUCTOR_COMPILE_THREADS": "2",
    "PYTHONHASHSEED": "0",  # for one graph to have one key in every process
}


def run_case(case: Case) -> dict[str, Any]:
    """Train and report."""
    import torch
    import transformers

    from tunefork.plan.host import operation_seconds
    from tunefork.plan.short_run import short_run

    device = torch.device(DEVICE)
    host_s = operation_seconds(device)
    measured = short_run(
        config(case.shape),
        build_of(case),
        lengths(case),
        micro_batch_tokens=case.rows * case.length,
        packing=case.packed,
        device=device,
    )
    is_cuda = device.type == "cuda"
    return {
        "case": case.name,
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        **asdict(measured),
        "reserved_bytes": torch.cuda.max_memory_reserved() if is_cuda else None,
        "host_operation_s": host_s,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


DEVICE = os.environ.get("PLANNER_DEVICE", "cuda:0")
"""On a CPU the script can be tried, with small `--cases` (135m-lora-2x64)."""


def prepare_case(case: Case) -> dict[str, Any]:
    """Compile what the case's layers are, and plan the case."""
    import torch

    from tunefork.plan.shape import at_depth
    from tunefork.plan.short_run import WARM_UP, short_run

    started = time.perf_counter()
    made = build_of(case)
    if case.compiled:
        short_run(
            at_depth(config(case.shape), 2),
            made,
            lengths(case)[: WARM_UP + 1],
            micro_batch_tokens=case.rows * case.length,
            packing=case.packed,
            device=torch.device(DEVICE),
        )
    compiled_s = time.perf_counter() - started
    steps = _planned(case)
    seconds = time.perf_counter() - started
    return {"case": case.name, "compiled_s": compiled_s, "prepared_s": seconds, "planned": steps}


def _planned(case: Case) -> list[dict[str, Any]]:
    """What the planner traces for each shape of pass that the case has."""
    from tunefork.data.pack import pack
    from tunefork.plan.batches import shape_of
    from tunefork.plan.short_run import examples_of
    from tunefork.plan.step import trace_step

    whole = config(case.shape)
    examples, steps = examples_of(lengths(case), whole.get_text_config().vocab_size)
    batches = [
        batch
        for step in steps
        for batch in pack(
            [examples[at] for at in step],
            max_tokens=case.rows * case.length,
            packing=case.packed,
        )
    ]
    shapes = dict.fromkeys(shape_of(batch) for batch in batches)
    made = build_of(case)
    return [
        {"shape": asdict(shape), "step": asdict(trace_step(whole, made, shape))} for shape in shapes
    ]


def measure(out: Path, names: list[str], seconds: float) -> None:
    """Prepare the cases, run them one after the other, and append a line for each to `out`."""
    deadline = time.monotonic() + seconds
    with out.open("a", encoding="utf-8") as stream:

        def tell(row: dict[str, Any]) -> None:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            _say(row)

        _prepare(names, time.monotonic() + _SHARE_TO_PREPARE * seconds, tell)
        waiting = None
        groups = [[n for n in names if read_case(n).shape == shape] for shape in SHAPES]
        groups = [group for group in groups if group]
        for group, after in zip(groups, [*groups[1:], None], strict=True):
            worker = waiting or _Worker("run", group)
            waiting = _Worker("run", after) if after else None  # imports meanwhile
            if not worker.finish(deadline, tell):
                print("out of time", flush=True)
                if waiting:
                    waiting.end()
                return


def _prepare(names: list[str], deadline: float, tell: Any) -> None:
    """All cases, several at a time, those that take longest to compile first."""
    left = queue.Queue[str]()
    order = sorted(names, key=lambda n: (not read_case(n).compiled, "fp8" not in n, "8b" not in n))
    for name in order:
        left.put(name)
    lock = threading.Lock()

    def told(row: dict[str, Any]) -> None:
        with lock:
            tell(row)

    def work() -> None:
        while time.monotonic() < deadline:
            try:
                name = left.get_nowait()
            except queue.Empty:
                return
            _Worker("prepare", [name]).finish(deadline, told)

    threads = [threading.Thread(target=work) for _ in range(_SIDE_BY_SIDE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class _Worker:
    """A process that does cases one after the other, once it is told to go."""

    def __init__(self, verb: str, names: list[str]) -> None:
        self.verb, self.left = verb, list(names)
        self.process = self._start()

    def _start(self) -> Any:
        command = [sys.executable, __file__, self.verb, *self.left]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | _ENVIRONMENT,
        )

    def finish(self, deadline: float, tell: Any) -> bool:
        """Tell each case's row; False where time ran out. A case that ends its process, or hangs,
        is told as an error, and the rest go on in another process."""
        while self.left:
            with _lines(self.process) as lines:
                self.process.stdin.write("go\n")
                self.process.stdin.flush()
                ended = self._read(lines, deadline, tell)
            self.end()
            if ended is None:
                return False
            if self.left:
                tell({"case": self.left.pop(0), "error": f"{self.verb}: {ended}"})
            if self.left:
                self.process = self._start()
        self.end()
        return True

    def _read(self, lines: Any, deadline: float, tell: Any) -> str | None:
        """Rows until the process ends: how it ended, or None where time ran out."""
        while True:
            most = _MOST_S[self.verb]
            try:
                line = lines.get(timeout=max(0.1, min(most, deadline - time.monotonic())))
            except queue.Empty:
                return None if time.monotonic() >= deadline else f"took longer than {most:g} s"
            if line is None:
                return f"its process ended with status {self.process.wait()}"
            if line.startswith("{"):
                row = json.loads(line)
                self.left.remove(row["case"])
                tell(row)

    def end(self) -> None:
        """Let nothing of it go on."""
        self.process.kill()
        self.process.wait()


@contextmanager
def _lines(process: Any) -> Iterator[Any]:
    """A queue of what the process prints; None once it has ended."""
    found = queue.Queue[Any]()

    def read() -> None:
        for line in process.stdout:
            found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    yield found


def work_on(verb: str, names: list[str]) -> None:
    """In a worker's process: import, wait to be told, then print a row a case."""
    import tunefork.plan.plan
    import tunefork.plan.short_run  # noqa: F401

    sys.stdin.readline()
    for name in names:
        try:
            row = (prepare_case if verb == "prepare" else run_case)(read_case(name))
        except Exception as error:  # one case that fails leaves the others' results standing
            row = {"case": name, "error": f"{verb}: {type(error).__name__}: {error}"[:300]}
        print(json.dumps(row), flush=True)


def _say(row: dict[str, Any]) -> None:
    if "error" in row:
        said = row["error"]
    elif "planned" in row:
        said = f"prepared in {row['prepared_s']:.0f} s, {row['compiled_s']:.0f} of them compiling"
    else:
        tensor, reserved = row["tensor_bytes"] or 0, row["reserved_bytes"] or 0
        sizes = f"{tensor / 2**30:7.2f} GiB {reserved / 2**30:7.2f} reserved"
        said = f"{sizes} {row['step_s']:.4f} s {row['step_s_spread']}"
    print(f"{time.strftime('%X')} {row['case']:34s} {said}", flush=True)


def runs(raw: Path) -> list[Any]:
    """The measured runs, ready to be predicted, by what was traced where they ran."""
    from benchmarks.fitting import Run
    from tunefork.plan import step as tracing
    from tunefork.plan.catalogue import load_catalogue
    from tunefork.plan.device import target_of
    from tunefork.plan.method import Case as Planned
    from tunefork.plan.passes import Shape
    from tunefork.plan.shape import count_params

    target = target_of(load_catalogue().machine(["h200"]))
    measured, planned = read_raw(raw)
    found = []
    for name, row in measured.items():
        if "error" in row:
            continue
        case = read_case(name)
        made, whole = build_of(case), config(case.shape)
        for there in planned.get(name, []):
            shape = Shape(**there["shape"])
            tracing.keep(whole, made, shape, step_from(there["step"]))
        found.append(
            Run(
                name=case.name,
                is_held_out=case.held_out,
                case=Planned(whole, count_params(whole), made, target),
                steps=[[Shape(**shape) for shape in step] for step in row["shapes"]],
                tensor_bytes=row["tensor_bytes"],
                process_bytes=row["process_bytes"],
                context_bytes=row["context_bytes"],
                step_s=row["step_s"],
            )
        )
    return found


def read_raw(raw: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last row of each case's run, and what was planned of each; a run beats an error."""
    measured: dict[str, Any] = {}
    planned: dict[str, Any] = {}
    for line in raw.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = row["case"]
        if "planned" in row:
            planned[name] = row["planned"]
        elif "error" not in row or "error" in measured.get(name, {"error": ""}):
            measured[name] = row
    order = [name for name in CASES if name in measured]
    return {name: measured[name] for name in order}, planned


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


def fit(raw: Path) -> None:
    """Fit on the cases that are not held out, judge on those that are, write both files."""
    from benchmarks.fitting import fit_memory, fit_time, write_fit
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
    found = found.model_copy(update={"time": fit_time(measured, start.time, FIRST_GRID)})
    rows = [_judged(run.with_fit(found)) for run in measured]
    held = [row for row in rows if row["held_out"]]
    worst_held, worst = _worst(held), _worst(rows)
    memory = {"tensor_error": _up(worst["tensor"]), "process_error": _up(worst["process"])}
    found = found.model_copy(
        update={
            "memory": found.memory.model_copy(update=memory),
            "time": found.time.model_copy(update={"error": _up(worst["step"])}),
        }
    )
    write_fit(found)
    judged = {row["case"]: row for row in rows}
    kept = (
        "step_s_spread",
        "steps_s",
        "host_operation_s",
        "context_bytes",
        "reserved_bytes",
        "losses",
        "error",
    )
    file = write(
        "planner_h200",
        [
            judged.get(name, {"case": name, "held_out": read_case(name).held_out})
            | {key: line[key] for key in kept if key in line}
            for name, line in lines.items()
        ],
        device=first["device"],
        command="python benchmarks/planner_h200.py measure; python benchmarks/planner_h200.py fit",
        versions=first["versions"],
    )
    missing = [name for name in CASES if name not in judged]
    print(f"worst of {len(held)} held out: {worst_held}; of all {len(rows)}: {worst}; {file}")
    print(f"not measured: {', '.join(missing) or 'none'}")


def _worst(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative error of each figure."""
    return {n: max(abs(row["errors"][n]) for row in rows) for n in ("tensor", "process", "step")}


def _judged(run: Any) -> dict[str, Any]:
    predicted = {
        "tensor_bytes": run.predicted_tensor_bytes(),
        "process_bytes": run.predicted_process_bytes(),
        "step_s": run.predicted_step_s(),
    }
    row: dict[str, Any] = {"case": run.name, "held_out": run.is_held_out}
    for name, value in predicted.items():
        row[f"predicted_{name}"] = value
        row[f"measured_{name}"] = getattr(run, name)
    row["errors"] = {
        name.partition("_")[0]: round(value / getattr(run, name) - 1, 4)
        for name, value in predicted.items()
    }
    print(f"{run.name:34s} {'held out' if run.is_held_out else '':9s} {row['errors']}", flush=True)
    return row


def _up(error: float) -> float:
    """Rounded up to tenths of a per cent, at least one per cent."""
    return max(10, math.ceil(1000 * error)) / 1000


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    measuring = verbs.add_parser("measure")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--seconds", type=float, default=540.0)
    measuring.add_argument("--cases", nargs="*", default=CASES)
    verbs.add_parser("hold-out")
    for verb in ("prepare", "run"):
        verbs.add_parser(verb).add_argument("names", nargs="+")
    verbs.add_parser("fit").add_argument("raw", type=Path)
    options = parser.parse_args()
    match options.verb:
        case "prepare" | "run":
            work_on(options.verb, options.names)
        case "hold-out":
            HELD_OUT_FILE.write_text("\n".join(held_out()) + "\n", encoding="utf-8")
        case "measure":
            done = read_raw(options.out)[0] if options.out.exists() else {}
            left = [n for n in options.cases if "error" in done.get(n, {"error": ""})]
            measure(options.out, left, options.seconds)
        case _:
            fit(options.raw)


if __name__ == "__main__":
    main()
