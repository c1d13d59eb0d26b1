"""Many adapters in one pass on one GPU: tokens a second of a group beside its peers.

    python -m benchmarks.h200_together measure --out RAW.jsonl [--runs ...] [--site unsloth=FOLDER]
    python -m benchmarks.h200_together collect RAW.jsonl [MORE.jsonl ...]

An 8B Llama's shape with random weights (the folder of `h200_training`), adapters on all linear
layers, every token supervised (`together_runs.py`). `measure` runs one process after the other and
appends a line for each as it ends. `collect` writes results/h200_together.json. An adapter's run
alone does as much a step as each of sixteen in turn, so the peers' "in turn" is one run of theirs,
at rank 16 (ours mix 8 to 64): tokens of a step over its median time.

    together_16x512    a group of 16 adapters with 512 tokens each: 8,192 a step
    together_64x128    64 adapters with 128 tokens each
    together_64x128_rank16  the same, all of rank 16: what 64 such adapters take beside the base

`--tiny` is for a CPU: it tests the script.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results, training_runs
from benchmarks.h200_training import in_a_process, roomy_folder
from benchmarks.together_runs import measure_group
from benchmarks.training_runs import BATCHES, EIGHT_B, TINY, WARM_UP, Run, need_gpu

_ROOT, _MODULE = Path(__file__).parents[1], "benchmarks.h200_together"
GROUP = "tunefork"
RUNS = {
    run.name: run
    for run in (
        Run("group_16x512", GROUP, 16, 512),
        Run("group_64x128", GROUP, 64, 128),
        Run("group_64x128_rank16", GROUP, 64, 128, {"rank": 16}),
        Run("group_16x512_kept", GROUP, 16, 512, {"keeps_operands": True}),
        Run("looped_16x512", GROUP, 16, 512, {"looped": True}),
        Run("unsloth_512", "unsloth", 1, 512),
        Run("unsloth_8192", "unsloth", 16, 512),
        Run("peft_512", "peft", 1, 512),
        Run("peft_512_defaults", "peft", 1, 512, {"defaults": True}),
        Run("unsloth_128", "unsloth", 1, 128),
    )
}
CASES: dict[str, tuple[str, tuple[str, ...], float, tuple[str, float] | None]] = {
    "together_16x512": (
        "group_16x512",
        ("unsloth_512", "peft_512", "peft_512_defaults", "looped_16x512", "unsloth_8192"),
        24_000.0,
        ("unsloth_512", 5.0),
    ),
    "together_64x128": ("group_64x128", ("unsloth_128",), 18_000.0, None),
    "together_64x128_rank16": ("group_64x128_rank16", (), 18_000.0, None),
}
"""Our run, what it is compared with, and what issue 7 asks: tokens/s, times a peer."""
ASKED = list(dict.fromkeys(name for own, peers, *_ in CASES.values() for name in (own, *peers)))
_SAID = {
    "looped_16x512": "mLoRA's way: a loop over the adapters' slices over our layers and int8 base",
    "group_16x512_kept": "as group_16x512, the bf16 forms of A and B kept for the backward pass",
    "unsloth_512": "one of sixteen runs in turn, use_gradient_checkpointing=False, rank 16",
    "unsloth_128": "one of sixty-four runs in turn, use_gradient_checkpointing=False, rank 16",
    "unsloth_8192": "one run of one adapter at 8,192 tokens a step, rank 16",
    "peft_512": "one of sixteen runs in turn, autocast_adapter_dtype=False, rank 16",
    "peft_512_defaults": "one of sixteen runs in turn, PEFT's defaults, rank 16",
}


def measure(arguments: argparse.Namespace) -> None:
    """Run each in a process of its own, a line of `--out` for each."""
    folder, call = arguments.model, datetime.now(UTC).isoformat()
    deadline, shape = time.monotonic() + arguments.seconds, TINY if arguments.tiny else EIGHT_B
    sites = dict(site.split("=", 1) for site in arguments.site)
    if not (folder / "tokenizer_config.json").exists():  # the last file to be written
        made = ["make", str(folder), *(["--tiny"] if arguments.tiny else [])]
        command = [sys.executable, "-m", "benchmarks.h200_training", *made]
        subprocess.run(command, check=True, cwd=_ROOT)
    for name in arguments.runs:
        run = RUNS[name]
        left = deadline - time.monotonic()
        if left < arguments.least:
            print(f"{name}: not run, {left:.0f} s are left", flush=True)
            continue
        if arguments.tiny:
            run = replace(run, rows=max(1, run.rows // 4), length=run.length // 16)
        began = time.perf_counter()
        if run.tool == GROUP:
            given = {"steps": arguments.steps, "vocabulary": shape.vocabulary}
            given |= {"most": 32} if arguments.tiny else {}
            said = dict(item.split("=", 1) for item in arguments.set)
            given["train"] = run.options.get("train", {}) | said
            run = replace(run, options=run.options | given)
            module = _MODULE
        else:
            num_steps = WARM_UP + arguments.peer_steps
            drawn = training_runs.draw_batches(run, num_steps, shape.vocabulary)
            np.savez(folder / BATCHES, **drawn)
            module = "benchmarks.h200_training"
        limit = min(arguments.limit, left)
        found = in_a_process(run, folder, sites.get(run.tool), limit, module)
        found |= {"run": name, "tool": run.tool, "call": call, "rows": run.rows}
        found |= {"length": run.length, "setting": _setting(run)}
        found["seconds"] = time.perf_counter() - began
        with arguments.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(found) + "\n")
        print(_line(found), flush=True)


def _setting(run: Run) -> str:
    if run.name in _SAID:
        return _SAID[run.name]
    given = {"precision": "int8", "compile": "always", **run.options.get("train", {})}
    return ", ".join(f"train.{key}: {value}" for key, value in given.items())


def _line(row: dict[str, Any]) -> str:
    start = f"{row['run']:22s} [{row['seconds']:.0f} s]"
    if "error" in row:
        return f"{start} {row['error']}"
    peak = f"{row['peak_gib']:.2f} GiB" if row["peak_gib"] else "-"
    captured = ", captured" if row.get("is_captured") else ""
    return (
        f"{start} {row['tokens_per_s']:,.0f} tokens/s, step {row['step_s'] * 1e3:.0f} ms, spread "
        f"{row['spread']:.3f}, {peak}{captured}, load {row['load_s']:.0f} s, first step "
        f"{row['first_step_s']:.1f} s, losses {row['losses'][0]:.4f} .. {row['losses'][-1]:.4f}"
    )


def collect(files: list[Path], name: str) -> Path:
    """Write the table; a case's own row is of the newest call that has one.

    A peer's row is of that call, or else of the newest that has both: a ratio is always of one
    call. A case without a run of ours is left out, a line cut off as its writer was killed too.
    """
    raw = [
        row
        for file in files
        for line in file.read_text("utf-8").splitlines()
        if (row := _read(line))
    ]
    fine = [row for row in raw if "error" not in row]
    rows: list[dict[str, Any]] = []
    for case, (own, peers, asked, ratio) in CASES.items():
        own_speeds = {row["call"]: row["tokens_per_s"] for row in fine if row["run"] == own}
        if not own_speeds:
            continue
        by_run = {(row["call"], row["run"]): row for row in raw}
        ours = {"case": case, "ours": True, **by_run[max(own_speeds), own]}
        found = []
        for peer in peers:
            calls = [call for call in own_speeds if (call, peer) in by_run]
            if calls:
                found.append({"case": case, "ours": False, **by_run[max(calls), peer]})
        ours["ratios"] = {
            row["run"]: own_speeds[row["call"]] / row["tokens_per_s"]
            for row in found
            if "tokens_per_s" in row
        }
        if older := {row["call"] for row in found} - {ours["call"]}:
            # An older call's ratio is to what ours made there, which may be other code.
            ours["ratios_to_older_calls_of"] = {call: own_speeds[call] for call in sorted(older)}
        ours["asked"] = {"tokens_per_s": [asked, ours["tokens_per_s"] >= asked]}
        if ratio is not None:
            reached = ours["ratios"].get(ratio[0])
            ours["asked"][f"times_{ratio[0]}"] = [ratio[1], reached and reached >= ratio[1]]
        rows += [ours, *found]
    if not rows:
        sys.exit(
            f"{', '.join(map(str, files))}: no run of ours came to its end; nothing is written"
        )
    used = {key: value for row in fine for key, value in row["versions"].items()}
    kept = [{k: v for k, v in row.items() if k not in ("versions", "process_s")} for row in rows]
    return results.write(
        name,
        kept,
        device=", ".join(sorted({row["device"] for row in fine})),
        command="python -m benchmarks.h200_together measure, then collect",
        versions=used,
    )


def _read(line: str) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        print(f"left out, as it is no whole line: {line[:60]}", file=sys.stderr)
        return None
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("measure")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--runs", nargs="+", choices=RUNS, default=ASKED)
    run.add_argument("--steps", type=int, default=24, help="timed, ours")
    run.add_argument("--peer-steps", type=int, default=12, help="timed, peers")
    run.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="our train section")
    run.add_argument("--site", nargs="+", default=[], metavar="TOOL=FOLDER")
    run.add_argument("--model", type=Path, help="where the weights lie, or are written")
    run.add_argument("--limit", type=float, default=90.0, help="seconds of one run")
    run.add_argument("--seconds", type=float, default=400.0, help="of all runs")
    run.add_argument("--least", type=float, default=20.0, help="with less left, none is begun")
    run.add_argument("--tiny", action="store_true", help="a small shape: tests the script")
    one = verbs.add_parser("one")
    one.add_argument("run", type=json.loads)
    one.add_argument("folder", type=Path)
    gather = verbs.add_parser("collect")
    gather.add_argument("raw", type=Path, nargs="+")
    gather.add_argument("--name", default="h200_together")
    return parser.parse_args()


def main() -> None:
    """Measure, or collect what was measured."""
    arguments = _arguments()
    match arguments.verb:
        case "measure":
            arguments.model = (arguments.model or roomy_folder()).resolve()
            arguments.model.mkdir(parents=True, exist_ok=True)
            measure(arguments)
        case "one":
            need_gpu(arguments.folder)
            found = measure_group(Run(**arguments.run), arguments.folder)
            print("RESULT " + json.dumps(found), flush=True)
        case "collect":
            print(collect(arguments.raw, arguments.name))


if __name__ == "__main__":
    main()
