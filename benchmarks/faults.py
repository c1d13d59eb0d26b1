"""Kills, cuts and costs: what a run loses when its process is killed, and what being safe costs.

    python -m benchmarks.faults kills [--kills 1000]     SIGKILLs spread over training and saving
    python -m benchmarks.faults cost                     the share of the time that checkpoints take

A process that has imported PyTorch and built a tiny model forks one child a kill (imports would
take seconds each). The child trains on from its newest checkpoint, saving one after every second
step, and reports through a pipe where it is: `step` done, and in the writing thread `tensors`,
`facts` or `manifest` begun, `renamed`, `saved` (the oldest goes then). The parent waits for one of
these, drawn at random, then for up to 2 ms, and kills. waitpid says that signal 9 ended it, what
the pipe still held where it was. Then the checkpoint that is found is read back and compared, bit
for bit, with what an undisturbed run had at that step; it may be no older than the last one
reported as saved. The next child goes on from there, and a run that comes to its end starts anew in
an empty folder.
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import results
from tests.train.test_state import KINDS, STEPS
from tests.train.test_state import run as train_tiny
from tunefork.data.example import Encoded
from tunefork.model.device import describe, pick_device, pick_dtype
from tunefork.recipe import Method
from tunefork.recipe_file import parse
from tunefork.train import checkpoint, loop
from tunefork.train.accumulate import random_states
from tunefork.train.checkpoints import Checkpoints, Policy
from tunefork.train.guard import SpikeWatch
from tunefork.train.loop import StepRecord, train
from tunefork.train.method import load_for_training, make_optimizer
from tunefork.train.state import Optimizer, Progress, capture, digest
from tunefork.trial.following import following

INTERVAL = 2
"""Steps between checkpoints."""
EVENTS = ("step", "tensors", "facts", "manifest", "renamed", "saved")
_LONGEST_PAUSE_S = 0.002


def _checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, {}, {}, Policy(every_steps=INTERVAL, keep=2), say=lambda line: None)


def _expected(kind: str) -> dict[int, str]:
    """Step -> hash of an undisturbed run's state there."""
    with tempfile.TemporaryDirectory() as scratch:
        saved = Checkpoints(Path(scratch), {}, {}, Policy(every_steps=INTERVAL, keep=len(STEPS)))
        end, _ = train_tiny(kind, saved)
        found = {len(STEPS): digest(end.tensors)}
        for folder in Path(scratch).iterdir():
            facts = checkpoint.read_facts(folder)
            found[facts.step] = digest(checkpoint.read(folder, facts).tensors)
    return found


def _child(kind: str, folder: Path, pipe: int) -> None:
    """Train to the end, telling `pipe` of each thing that is about to happen, or has."""

    def tell(event: str, step: int) -> None:
        os.write(pipe, f"{event} {step}\n".encode())

    def telling(event: str, first: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            digits = [c for c in str(arguments[0]).partition("step-")[2][:6] if c.isdigit()]
            step = int("".join(digits) or 0)
            if not after:
                tell(event, step)
            value = first(*arguments, **options)
            if after:
                tell(event, step)
            return value

        return call

    checkpoint.write_tensors = telling("tensors", checkpoint.write_tensors)
    write_text = checkpoint._write_text
    kinds = {checkpoint.FACTS: "facts", checkpoint.MANIFEST: "manifest"}
    checkpoint._write_text = lambda file, text: telling(kinds[file.name], write_text)(file, text)
    Path.rename = telling("renamed", Path.rename, after=True)  # type: ignore[method-assign]
    loop.reset_peak = lambda device: None  # hands memory back to the system, slowly
    write = checkpoint.write

    def write_and_tell(state: Any, *arguments: Any, **options: Any) -> Any:
        made = write(state, *arguments, **options)
        tell("saved", state.progress.step)
        return made

    checkpoint.write = write_and_tell
    end, _ = train_tiny(kind, _checkpoints(folder), on_step=lambda r: tell("step", r.step))
    os.write(pipe, f"end {digest(end.tensors)}\n".encode())


def _one(
    kind: str, folder: Path, at: int, draw: random.Random
) -> tuple[str | None, int, list[str]]:
    """Fork, kill somewhere; returns what waitpid saw (None: it had ended) and all events."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            _child(kind, folder, writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    steps_left = len(STEPS) - at
    target, text = draw.randrange(steps_left + 5 * ((steps_left - 1) // INTERVAL)), b""
    while text.count(b"\n") <= target:
        part = os.read(reader, 1)  # byte by byte: no further than the event that is waited for
        if not part:
            break
        text += part
    time.sleep(draw.uniform(0, _LONGEST_PAUSE_S))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while part := os.read(reader, 65536):
        text += part
    os.close(reader)
    signalled = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else None
    code = os.waitstatus_to_exitcode(status)
    return signalled, code, text.decode().splitlines()


def kills(
    wanted: int, kinds: tuple[str, ...] = tuple(KINDS), seed: int = 0
) -> list[dict[str, Any]]:
    """Kill until `wanted` have landed, spread evenly over `kinds`; one row a kind."""
    torch.set_num_threads(1)
    rows = []
    for number, kind in enumerate(kinds):
        share = wanted * (number + 1) // len(kinds) - wanted * number // len(kinds)
        rows.append(_kills_of(kind, share, random.Random(f"{seed} {kind}")))
    return rows


def _kills_of(kind: str, wanted: int, draw: random.Random) -> dict[str, Any]:
    expected, landed = _expected(kind), 0
    where: Counter[str] = Counter()
    unloadable = wrong = ended = over = over_unexplained = most_lost = 0
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, all that was here before it
    with tempfile.TemporaryDirectory() as scratch:
        folder, acknowledged, at = Path(scratch) / "checkpoints", 0, 0
        while landed < wanted:
            signalled, code, events = _one(kind, folder, at, draw)
            saved = [int(e.split()[1]) for e in events if e.startswith("saved")]
            acknowledged = max([acknowledged, *saved])
            if signalled == "SIGKILL":
                landed += 1
                where[events[-1].split()[0] if events else "start"] += 1
            elif code != 0:
                raise RuntimeError(f"the child failed by itself, status {code}")
            if events and events[-1].startswith("end"):
                ended += 1
                wrong += events[-1].split()[1] != expected[len(STEPS)]
                shutil.rmtree(folder, ignore_errors=True)
                acknowledged = at = 0
                continue
            steps = [int(e.split()[1]) for e in events if e.startswith("step")]
            found = _checkpoints(folder).newest()
            if found is None:
                unloadable += acknowledged > 0
                at = 0
            else:
                at = found.facts.step
                wrong += digest(found.read().tensors) != expected[at]
                unloadable += at < acknowledged
            lost = max([at, *steps]) - at
            most_lost = max(most_lost, lost)
            # One that was due is being written while steps go on: counted apart.
            is_writing = any(event.startswith("tensors") for event in events[-5:])
            over += lost > INTERVAL
            over_unexplained += lost > INTERVAL and not is_writing
    return {
        "case": f"kills, {kind}",
        "kills": landed,
        "where": dict(sorted(where.items())),
        "runs_ended": ended,
        "unloadable": unloadable,
        "not_bit_equal": wrong,
        "most_steps_lost": most_lost,
        "interval_steps": INTERVAL,
        "over_an_interval": over,
        "over_an_interval_and_none_being_written": over_unexplained,
    }


COST_INTERVAL_S = 300.0
_COST_EXAMPLES = 16


def cost() -> list[dict[str, Any]]:
    """What checkpoints take of a run of the demo's model, by method; the disk is this machine's."""
    rows = []
    for method in Method:
        recipe = parse(
            {
                "model": "smollm2-135m-instruct",
                "data": {"train": "none.jsonl", "max_length": 128},
                "method": method,
                "train": {"batch_size": 8},
            }
        )
        device = pick_device()
        dtype = pick_dtype("auto", device)
        model = load_for_training(recipe, method, dtype=dtype, device=device, seed=0)
        optimizer = make_optimizer(model, recipe, method, seed=0)
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
            rows.append(_cost_of(method, model, optimizer, Path(scratch)))
    return rows


def _cost_of(method: Method, model: Any, optimizer: Optimizer, folder: Path) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    examples = [
        Encoded(f"row {i}", draw.integers(3, 49152, 100).astype(np.int32), np.arange(100) >= 90)
        for i in range(_COST_EXAMPLES)
    ]
    saved = _checkpoints(folder)
    saved.policy = Policy()
    result = train(
        model,
        examples,
        [list(range(8))] * 6,
        optimizer,
        learning_rates=[1e-5] * 6,
        micro_batch_tokens=4096,
        packing=True,
        pad_id=0,
        max_grad_norm=1.0,
        seed=0,
        checkpoints=saved,
    )
    progress, held_up, whole = Progress(step=1), list[float](), list[float]()
    for _ in range(3):
        began = time.perf_counter()
        with saved:
            saved.save(model, optimizer, progress, wait=False)
            held_up.append(time.perf_counter() - began)
        whole.append(time.perf_counter() - began)
    checks = 10_000
    began = time.perf_counter()
    for step in range(checks):
        saved.check()
        saved.is_due(Progress(step=step))
    check_s = (time.perf_counter() - began) / checks
    watch_s = _watch_seconds(model.device, result.steps[-1], folder)
    step_s = result.seconds / result.num_steps
    return {
        "case": f"cost, {method}",
        "step_s": step_s,
        "state_bytes": capture(model, optimizer, progress, copy=False).num_bytes(),
        "training_waits_s": statistics.median(held_up),
        "save_s": statistics.median(whole),
        "save_s_spread": [min(whole), max(whole)],
        "check_s": check_s,
        "watch_s": watch_s,
        "interval_s": COST_INTERVAL_S,
        # As if all of the writing slowed training down, which on a CPU of few cores it may.
        "share": statistics.median(whole) / COST_INTERVAL_S + (check_s + watch_s) / step_s,
    }


def _watch_seconds(device: torch.device, step: StepRecord, folder: Path) -> float:
    """Of a step: random states kept for a retry, the spike watch, the line in events.jsonl."""
    steps, watch = 1000, SpikeWatch()
    with following(folder, print) as told:
        began = time.perf_counter()
        for number in range(steps):
            random_states(device)
            watch.found(step.loss + 0.01 * (number % 7))
            told.on_step(step, steps, device)
        return (time.perf_counter() - began) / steps


def main() -> None:
    """Run what is asked for; its rows replace those of its kind in results/faults.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["kills", "cost"])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--no-write", action="store_true", help="leave results/faults.json alone")
    options = parser.parse_args()
    began = time.perf_counter()
    rows = kills(options.kills) if options.what == "kills" else cost()
    for row in rows:
        print(json.dumps(row))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    if options.no_write:
        return
    file = results.FOLDER / "faults.json"
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    kept = [row for row in kept if not row["case"].startswith(f"{options.what},")]
    results.write("faults", kept + rows, device=str(describe(torch.device("cpu"))["name"]))


if __name__ == "__main__":
    main()
