"""Tokens a second and memory of training on one GPU, tunefork beside its peers in the same call.

    python -m benchmarks.h200_training measure --out RAW.jsonl [--cases ...] [--tools ...]
    python -m benchmarks.h200_training collect RAW.jsonl [MORE.jsonl ...]

An 8B Llama's shape with random weights, rank 16 on all linear layers, every token supervised; how
each tool is run is in `training_runs.py`. `measure` runs one process after the other and appends a
line for each as it ends, so that a kill loses one run. `collect` writes results/h200_training.json;
a ratio is of runs of one call, which took one machine: of one `measure`, or of several that are
told the first one's `--call`. A run that is repeated in it counts by its median.

A tool whose packages lie in a folder of their own: --site unsloth=FOLDER.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import training_runs
from benchmarks.training_cases import CASES, TOOLS, chosen_runs, setting
from benchmarks.training_runs import (
    BATCHES,
    EIGHT_B,
    NO_GPU,
    NUM_LOSSES,
    TINY,
    WARM_UP,
    Run,
    Shape,
    need_gpu,
)

_ROOT, _MODULE = Path(__file__).parents[1], "benchmarks.h200_training"


def measure(arguments: argparse.Namespace) -> None:
    """Run each in a process of its own, a line of `--out` for each."""
    tiny, folder = arguments.tiny, arguments.model
    call = arguments.call or datetime.now(UTC).isoformat()
    deadline, shape = time.monotonic() + arguments.seconds, _shape(tiny)
    sites = dict(site.split("=", 1) for site in arguments.site)
    if not (folder / "tokenizer_config.json").exists():  # the last file to be written
        began = time.perf_counter()
        made = ["make", str(folder), *(["--tiny"] if tiny else [])]
        subprocess.run([sys.executable, "-m", _MODULE, *made], check=True, cwd=_ROOT)
        print(f"weights written to {folder} in {time.perf_counter() - began:.0f} s", flush=True)
    overrides = dict(override.split("=", 1) for override in arguments.set)
    for run in chosen_runs(arguments.cases, arguments.tools):
        if run.name in arguments.without:
            continue
        left = deadline - time.monotonic()
        if left < arguments.least:
            print(f"{run.name}: not run, {left:.0f} s are left", flush=True)
            continue
        if tiny:
            run = replace(run, rows=2, length=min(run.length, 64) // 4)
        is_plain = run.name.startswith("plain")
        is_ours = run.tool == "tunefork"
        if is_ours and not is_plain:
            run = replace(run, options=run.options | overrides)
        timed = arguments.steps if is_ours else arguments.peer_steps
        batches = training_runs.draw_batches(run, WARM_UP + timed, shape.vocabulary)
        np.savez(folder / BATCHES, **batches)
        began = time.perf_counter()
        found = in_a_process(run, folder, sites.get(run.tool), min(arguments.limit, left))
        found |= {"run": run.name, "tool": run.tool, "setting": setting(run), "call": call}
        found["seconds"] = time.perf_counter() - began
        with arguments.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(found) + "\n")
        print(_line(found), flush=True)


def in_a_process(
    run: Run, folder: Path, site: str | None, limit_s: float, module: str = _MODULE
) -> dict[str, Any]:
    """What the run's own process says, or why it ended without a word; `module` has a verb one."""
    packages = str(Path(site).resolve()) if site else os.environ.get("PYTHONPATH", "")
    paths = [str(_ROOT), str(_ROOT / "src"), *([packages] if packages else [])]
    environment = os.environ | {"PYTHONPATH": ":".join(paths)}
    if run.tool != "unsloth":  # which sets its own
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if run.tool == "tunefork":
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", "/tmp/tunefork_inductor")
    command = [sys.executable, "-m", module, "one", json.dumps(asdict(run)), str(folder)]
    try:
        done = subprocess.run(  # in the folder, for Unsloth writes a cache where it is started
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace")[-600:]
        return {"error": f"not done after {limit_s:.0f} s; {said}"}
    said_lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if said_lines:
        found: dict[str, Any] = json.loads(said_lines[-1].removeprefix("RESULT "))
        return found
    if done.returncode == NO_GPU:
        raise SystemExit("no GPU is seen any more: what has been measured is kept")
    print(done.stderr[-3000:], file=sys.stderr, flush=True)
    reason = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["nothing"]
    return {"error": f"exit status {done.returncode}: {reason[-1][:400]}"}


def _line(row: dict[str, Any]) -> str:
    start = f"{row['run']:28s} [{row['seconds']:.0f} s]"
    if "error" in row:
        return f"{start} {row['error']}"
    peak = f"{row['peak_gib']:.2f} GiB" if row["peak_gib"] else "-"
    return (
        f"{start} {row['tokens_per_s']:,.0f} tokens/s, spread {row['spread']:.3f}, {peak}, load "
        f"{row['load_s']:.0f} s, first step {row['first_step_s']:.1f} s, losses "
        f"{row['losses'][0]:.4f} .. {row['losses'][-1]:.4f}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("measure")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    run.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    run.add_argument("--without", nargs="+", default=[], metavar="RUN", help="by name")
    run.add_argument("--steps", type=int, default=NUM_LOSSES - WARM_UP, help="timed, ours")
    run.add_argument("--peer-steps", type=int, default=9, help="timed, peers")
    run.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="our recipe")
    run.add_argument("--site", nargs="+", default=[], metavar="TOOL=FOLDER")
    run.add_argument("--model", type=Path, help="where the weights lie, or are written")
    run.add_argument("--call", help="of an earlier measure, whose machine is the same")
    run.add_argument("--limit", type=float, default=240.0, help="seconds of one run")
    run.add_argument("--seconds", type=float, default=550.0, help="of all runs")
    run.add_argument("--least", type=float, default=35.0, help="with less left, none is begun")
    run.add_argument(
        "--tiny", action="store_true", help="a small shape: tests the script, on a CPU"
    )
    one = verbs.add_parser("one")
    one.add_argument("run", type=json.loads)
    one.add_argument("folder", type=Path)
    make = verbs.add_parser("make")
    make.add_argument("folder", type=Path)
    make.add_argument("--tiny", action="store_true")
    gather = verbs.add_parser("collect")
    gather.add_argument("raw", type=Path, nargs="+")
    gather.add_argument("--name", default="h200_training")
    return parser.parse_args()


def _shape(tiny: bool) -> Shape:
    return TINY if tiny else EIGHT_B


def roomy_folder() -> Path:
    """Memory for 16 GB of weights where there is enough of it, else the disk."""
    shared = Path("/dev/shm")
    is_roomy = shared.is_dir() and shutil.disk_usage(shared).free > 20e9
    return (shared if is_roomy else Path("/tmp")) / "tunefork_8b"


def main() -> None:
    """Measure, or collect what was measured."""
    arguments = _arguments()
    match arguments.verb:
        case "measure":
            if arguments.model is None:
                arguments.model = roomy_folder()
            arguments.model = arguments.model.resolve()
            arguments.model.mkdir(parents=True, exist_ok=True)
            measure(arguments)
        case "make":
            training_runs.make_model(arguments.folder, _shape(arguments.tiny))
        case "one":
            need_gpu(arguments.folder)
            found = training_runs.measure(Run(**arguments.run), arguments.folder)
            print("RESULT " + json.dumps(found), flush=True)
        case "collect":
            from benchmarks.training_table import collect

            print(collect(arguments.raw, arguments.name))


if __name__ == "__main__":
    main()
