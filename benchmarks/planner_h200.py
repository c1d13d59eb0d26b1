"""The planner beside what runs really take: peak tensor memory, process memory, time of a step.

Each case (`planner_cases.py`) is a real training run, with random weights and tokens and every
token supervised, by the code that `tunefork train` runs.

    python benchmarks/planner_h200.py hold-out                    writes the list of those held out
    python benchmarks/planner_h200.py estimate                    anywhere: how long each will take
    python benchmarks/planner_h200.py measure --out RAW.jsonl     on the GPU, 8 to 10 minutes
    python benchmarks/planner_h200.py fit RAW.jsonl               anywhere: fits, writes the results
    python benchmarks/planner_h200.py judge RAW.jsonl             anywhere: by today's constants

`measure` appends a line a case as it goes, and goes on with what is missing when called again.
First it compiles all cases side by side, on models of two layers, into PyTorch's cache on the disk,
and plans each one there, with the very PyTorch that will run it (`--only-prepare`: and stops; that
may share the GPU with other work). Then it runs one after the other, each in a process of its own,
for memory to be its alone, while nothing else is on the host.

`fit` writes src/tunefork/plan/fits.yaml (what the planner uses) and results/planner_h200.json;
with `--dry` neither. On a CPU all of it can be tried:

    PLANNER_DEVICE=cpu python benchmarks/planner_h200.py measure --out /tmp/raw.jsonl \\
        --cases tiny-lora-2x64 tiny-full-2x64-full tiny-qlora-2x64-packed
    python benchmarks/planner_h200.py fit --dry /tmp/raw.jsonl
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
    Case,
    build_of,
    config,
    held_out,
    lengths,
    read_case,
)
from benchmarks.planner_fit import fit, judge, read_raw
from benchmarks.workers import Worker

_SIDE_BY_SIDE = max(1, min(8, (os.cpu_count() or 1) // 2))
"""Processes that compile at the same time."""
_SHARE_TO_PREPARE = 0.4
"""Of the time given: what is not compiled by then is compiled in its own run."""
_AT_ONCE = 8
"""Processes that import what they need before the first of them runs."""
_STARTING_S = {True: 14.0, False: 6.0}
"""For `estimate`: a run's process and its model, compiled (from the cache) or not; guessed."""


def run_case(case: Case) -> dict[str, Any]:
    """Train and report."""
    import torch
    import transformers

    from tunefork.plan.host import operation_seconds
    from tunefork.plan.short_run import short_run

    device = torch.device(DEVICE)
    is_cuda = device.type == "cuda"
    free, total = torch.cuda.mem_get_info(device) if is_cuda else (0, 0)
    host_s = operation_seconds(device)
    measured = short_run(
        config(case.shape),
        build_of(case),
        lengths(case),
        micro_batch_tokens=case.rows * case.length,
        packing=case.packed,
        device=device,
    )
    return {
        "case": case.name,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        **asdict(measured),
        "reserved_bytes": torch.cuda.max_memory_reserved() if is_cuda else None,
        # A bare context, unless something else holds memory, which would count as this run's.
        "used_before_bytes": total - free,
        "host_operation_s": host_s,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


DEVICE = os.environ.get("PLANNER_DEVICE", "cuda:0")


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


def _shapes(case: Case) -> list[list[Any]]:
    """Of each step's passes."""
    from tunefork.data.pack import pack
    from tunefork.plan.batches import shape_of
    from tunefork.plan.short_run import examples_of

    vocabulary = config(case.shape).get_text_config().vocab_size
    examples, steps = examples_of(lengths(case), vocabulary)
    most = case.rows * case.length
    return [
        [
            shape_of(batch)
            for batch in pack([examples[at] for at in step], max_tokens=most, packing=case.packed)
        ]
        for step in steps
    ]


def _planned(case: Case) -> list[dict[str, Any]]:
    """What the planner traces for each shape of pass that the case has."""
    from tunefork.plan.step import trace_step

    whole, made = config(case.shape), build_of(case)
    shapes = dict.fromkeys(shape for step in _shapes(case) for shape in step)
    return [
        {"shape": asdict(shape), "step": asdict(trace_step(whole, made, shape))} for shape in shapes
    ]


def estimate(names: list[str]) -> None:
    """Print how long each case will take on an H200, by the plan's own seconds of a step."""
    from tunefork.plan.case import Case as Planned
    from tunefork.plan.catalogue import load_catalogue
    from tunefork.plan.device import target_of
    from tunefork.plan.method import one_pass_seconds
    from tunefork.plan.shape import count_params
    from tunefork.plan.time import update_seconds

    target, so_far = target_of(load_catalogue().machine(["h200"])), 0.0
    for name in names:
        case, whole = read_case(name), config(read_case(name).shape)
        planned, steps = Planned(whole, count_params(whole), build_of(case), target), _shapes(case)
        step = planned.step(steps[0][0])
        training_s = len(steps) * update_seconds(step.update, target.rates, target.fit.time)
        training_s += sum(
            one_pass_seconds(planned, step, planned.step(shape).work, shape)
            for passes in steps
            for shape in passes
        )
        so_far += training_s + _STARTING_S[case.compiled]
        held = "held out" if case.held_out else ""
        gib = planned.memory(steps[0][0]).process.mid / 2**30
        print(f"{name:38s} {held:8s} {gib:6.1f} GiB  {training_s:5.1f} s, {so_far:4.0f} in all")


def measure(out: Path, names: list[str], seconds: float, *, only_prepare: bool) -> None:
    """Prepare the cases that are not yet, run those that were not, and append their lines."""
    deadline = time.monotonic() + seconds
    done, planned = read_raw(out) if out.exists() else ({}, {})
    unplanned = [name for name in names if name not in planned]
    left = [name for name in names if "error" in done.get(name, {"error": ""})]
    with out.open("a", encoding="utf-8") as stream:

        def tell(row: dict[str, Any]) -> None:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            _say(row)

        if only_prepare:
            _prepare(unplanned, deadline, tell)
            return
        _prepare(unplanned, time.monotonic() + _SHARE_TO_PREPARE * seconds, tell)
        for at in range(0, len(left), _AT_ONCE):
            if not _run(left[at : at + _AT_ONCE], deadline, tell):
                print("out of time", flush=True)
                break


def _run(names: list[str], deadline: float, tell: Any) -> bool:
    """One after the other, nothing else on the host: a step at its pace would tell of that too.
    False where time ran out."""
    workers = [Worker(__file__, "run", [name]) for name in names]
    try:
        for worker in workers:
            worker.wait_until_ready()
        return all(worker.finish(deadline, tell) for worker in workers)
    finally:
        for worker in workers:
            worker.end()


def _prepare(names: list[str], deadline: float, tell: Any) -> None:
    """All cases, several at a time, those that take longest to compile first."""
    left = queue.Queue[str]()
    order = sorted(names, key=lambda n: (not read_case(n).compiled, "int8" not in n, "8b" not in n))
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
    import torch._inductor.compile_fx  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    print("ready", flush=True)
    # Not this library yet: bitsandbytes looks at the GPU, on which another case is measured.
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
    measuring.add_argument("--only-prepare", action="store_true")
    verbs.add_parser("hold-out")
    for verb in ("prepare", "run"):
        verbs.add_parser(verb).add_argument("names", nargs="+")
    estimating = verbs.add_parser("estimate")
    estimating.add_argument("--cases", nargs="*", default=CASES)
    fitting = verbs.add_parser("fit")
    fitting.add_argument("raw", type=Path)
    fitting.add_argument("--dry", action="store_true", help="write nothing")
    verbs.add_parser("judge").add_argument("raw", type=Path)
    options = parser.parse_args()
    match options.verb:
        case "prepare" | "run":
            work_on(options.verb, options.names)
        case "hold-out":
            HELD_OUT_FILE.write_text("\n".join(held_out()) + "\n", encoding="utf-8")
        case "measure":
            measure(options.out, options.cases, options.seconds, only_prepare=options.only_prepare)
        case "estimate":
            estimate(options.cases)
        case "judge":
            judge(options.raw)
        case _:
            fit(options.raw, writes=not options.dry)


if __name__ == "__main__":
    main()
