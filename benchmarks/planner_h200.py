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
import os
import queue
import sys
import threading
import time
from dataclasses import asdict
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
from benchmarks.planner_fit import fit, read_raw
from benchmarks.workers import Worker

_SIDE_BY_SIDE = 8
"""Processes that compile at the same time."""
_SHARE_TO_PREPARE = 0.4
"""Of the time given: what is not compiled by then is compiled in its own run."""


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
            worker = waiting or Worker(__file__, "run", group)
            waiting = Worker(__file__, "run", after) if after else None  # imports meanwhile
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
            Worker(__file__, "prepare", [name]).finish(deadline, told)

    threads = [threading.Thread(target=work) for _ in range(_SIDE_BY_SIDE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


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
