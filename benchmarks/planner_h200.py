"""The planner beside what runs really take: peak tensor memory, process memory, time of a step.

Each case is a real training run (random weights, random tokens, every token supervised) by the code
that `tunefork train` runs. A third of the cases, chosen by a salted hash of their names, and one
whole model size are held out from the fit. The list of them is a file, `planner_h200_held_out.txt`,
committed before the grid was measured; `fit` refuses a list that differs from the hash's.

    python benchmarks/planner_h200.py hold-out                    writes that list
    python benchmarks/planner_h200.py measure --out RAW.jsonl     on the GPU, about 8 minutes
    python benchmarks/planner_h200.py fit RAW.jsonl               anywhere: fits, writes the results

`fit` writes src/tunefork/plan/fits.yaml (what the planner uses) and results/planner_h200.json.
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


def _llama(
    width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "135m": _llama(576, 1536, 30, 9, 3, 49_152),
    "360m": _llama(960, 2560, 32, 15, 5, 49_152),
    "0.6b": _llama(1024, 3072, 28, 16, 8, 151_936, model_type="qwen3", head_dim=128),
    "1b": _llama(2048, 8192, 16, 32, 8, 128_256),
    "8b": _llama(4096, 14_336, 32, 32, 8, 128_256, tie_word_embeddings=False),
    "1.7b": _llama(2048, 6144, 28, 16, 8, 151_936, model_type="qwen3", head_dim=128),
    "3b": _llama(3072, 8192, 28, 24, 8, 128_256),
}
"""SmolLM2-135M and -360M, Qwen3-0.6B, Llama-3.2-1B, Llama-3.1-8B, Qwen3-1.7B, Llama-3.2-3B, in the
order in which they are measured."""

HELD_OUT_SHAPE = "1.7b"
"""A size that no run had been measured of when the model of time and memory was settled."""
SALT = "tunefork planner, third grid"
HELD_OUT_FILE = Path(__file__).with_name("planner_h200_held_out.txt")

CASES = [
    "135m-lora-16x768",
    "135m-qlora-12x1024-packed-eager",
    "360m-lora-8x1024-fp8-full",
    "360m-full-8x512-8bit-eager",
    "0.6b-lora-8x768-eager",
    "0.6b-lora-4x1024-packed",
    "1b-lora-8x1024",
    "1b-lora-8x1024-fp8-selective",
    "1b-lora-4x4096-full-eager",
    "1b-qlora-8x768-fp8-offload",
    "1b-full-8x768-eager",
    "1.7b-lora-4x1536-fp8",
    "1.7b-lora-8x1536-full-eager",
    "1.7b-qlora-8x1024-full",
    "1.7b-full-4x2048-adamwbf16-full",
    "3b-lora-8x1024-offload",
    "3b-lora-2x4096-packed-full-eager",
    "3b-qlora-2x2048-eager",
    "3b-full-4x2048-bf16-full-eager",
    "8b-lora-8x2048",
    "8b-lora-8x2048-fp8",
    "8b-lora-8x2048-fp8-full",
    "8b-lora-8x2048-fp8-offload",
    "8b-lora-4x1536-r64-fp8-selective",
    "8b-lora-8x64-fp8",
    "8b-lora-2x2048-eager",
    "8b-lora-4x2048-fp8-full-eager",
    "8b-qlora-8x2048-fp8-offload",
    "8b-qlora-4x2048-full-eager",
    "8b-full-4x2048-bf16-8bit-full-eager",
]
"""Compiled, and captured where the engine would, unless the name ends in `eager`."""
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
CHECKPOINTING = ("selective", "full", "offload")
OPTIMIZERS = {"8bit": "adamw_8bit", "adamwbf16": "adamw_bf16"}
WARM_UP = 3
TIMED, TIMED_SMALL = 8, 20
"""Steps whose median is the figure; more where the host sets the pace, for its steps scatter."""
_SMALL = ("135m", "360m", "0.6b")


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    name: str
    shape: str
    method: str
    rows: int
    length: int
    rank: int
    checkpointing: str
    compiled: bool
    fp8: bool
    packed: bool
    """Examples of many lengths share rows."""
    weights: str
    optimizer: str

    @property
    def held_out(self) -> bool:
        """Chosen before anything was measured."""
        digest = hashlib.sha256(f"{SALT}: {self.name}".encode()).digest()
        return self.shape == HELD_OUT_SHAPE or digest[0] % 3 == 0


def read_case(name: str) -> Case:
    """The run that a name stands for."""
    shape, method, size, *options = name.split("-")
    rows, length = size.split("x")
    ranks = [int(option[1:]) for option in options if re.fullmatch(r"r\d+", option)]
    return Case(
        name=name,
        shape=shape,
        method=method,
        rows=int(rows),
        length=int(length),
        rank=ranks[0] if ranks else 16,
        checkpointing=next((o for o in options if o in CHECKPOINTING), "none"),
        compiled="eager" not in options,
        fp8="fp8" in options,
        packed="packed" in options,
        weights="bf16" if {"bf16", "adamwbf16"} & set(options) else "fp32",
        optimizer=next((kind for name, kind in OPTIMIZERS.items() if name in options), "adamw"),
    )


def config(shape: str) -> Any:
    """The transformers configuration of a shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**SHAPES[shape])


def lengths(case: Case) -> list[list[int]]:
    """Tokens of each step's examples."""
    import numpy as np

    draw = np.random.default_rng(0)
    steps = []
    is_small = case.shape in _SMALL or case.rows * case.length <= 1024
    for _ in range(WARM_UP + (TIMED_SMALL if is_small else TIMED)):
        if case.packed:
            drawn = draw.integers(case.length // 8, case.length // 2, 4 * case.rows)
            steps.append(drawn[np.cumsum(drawn) < 0.85 * case.rows * case.length].tolist())
        else:
            steps.append([case.length] * case.rows)
    return steps


def build_of(case: Case) -> Any:
    """How the planner describes the case's model."""
    import torch

    from tunefork.plan.built import Build
    from tunefork.recipe import FullSection, LoraSection, Method

    return Build(
        method=Method(case.method),
        lora=LoraSection(rank=case.rank),
        full=FullSection(weights=case.weights, optimizer=case.optimizer),  # type: ignore[arg-type]
        dtype=torch.bfloat16,
        checkpointing=case.checkpointing,  # type: ignore[arg-type]
        device="cuda",
        wants_fp8=case.fp8,
        is_compiled=case.compiled,
    )


def measure_one(case: Case) -> dict[str, Any]:
    """Train and report."""
    import torch
    import transformers

    from tunefork.plan.host import operation_seconds
    from tunefork.plan.short_run import short_run

    host_s = operation_seconds(torch.device("cuda", 0))
    measured = short_run(
        config(case.shape),
        build_of(case),
        lengths(case),
        micro_batch_tokens=case.rows * case.length,
        packing=case.packed,
        device=torch.device("cuda", 0),
    )
    return {
        "case": case.name,
        "device": torch.cuda.get_device_name(),
        **asdict(measured),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "host_operation_s": host_s,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def measure(out: Path, names: list[str], seconds: float) -> None:
    """Run the cases, those of one shape in one process, and append a line for each to `out`."""
    deadline = time.monotonic() + seconds
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    with out.open("a", encoding="utf-8") as stream:
        for shape in SHAPES:
            of_shape = [name for name in names if read_case(name).shape == shape]
            if not of_shape:
                continue
            command = [sys.executable, __file__, "one", *of_shape]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    stream.write(line)
                    stream.flush()
                    _say(json.loads(line))
                if time.monotonic() > deadline:
                    process.kill()
                    print("out of time", flush=True)
                    return
            process.wait()


def _say(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{row['case']:34s} {row['error']}", flush=True)
        return
    tensor, reserved = row["tensor_bytes"] / 2**30, row["reserved_bytes"] / 2**30
    sizes = f"{tensor:7.2f} GiB {reserved:7.2f} reserved"
    print(f"{row['case']:34s} {sizes} {row['step_s']:.4f} s {row['step_s_spread']}", flush=True)


def runs(raw: Path) -> list[Any]:
    """The measured runs, ready to be predicted."""
    from benchmarks.fitting import Run
    from tunefork.plan.catalogue import load_catalogue
    from tunefork.plan.device import target_of
    from tunefork.plan.method import Case as Planned
    from tunefork.plan.passes import Shape
    from tunefork.plan.shape import count_params

    target = target_of(load_catalogue().machine(["h200"]))
    found = []
    for line in raw.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "error" in row:
            continue
        case = read_case(row["case"])
        made = config(case.shape)
        found.append(
            Run(
                name=case.name,
                is_held_out=case.held_out,
                case=Planned(made, count_params(made), build_of(case), target),
                steps=[[Shape(**shape) for shape in step] for step in row["shapes"]],
                tensor_bytes=row["tensor_bytes"],
                process_bytes=row["process_bytes"],
                context_bytes=row["context_bytes"],
                step_s=row["step_s"],
            )
        )
    return found


def fit(raw: Path) -> None:
    """Fit on the cases that are not held out, judge on those that are, write both files."""
    from benchmarks.fitting import fit_memory, fit_time, write_fit
    from benchmarks.results import write
    from tunefork.plan.fits import fit_for, installed, minor

    if HELD_OUT_FILE.read_text(encoding="utf-8").split() != _held_out():
        raise SystemExit(f"{HELD_OUT_FILE.name} is not the list that the names' hash chooses")
    measured = [run.traced() for run in runs(raw)]
    lines = [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]
    software = replace(installed("cuda"), torch=minor(lines[0]["versions"]["torch"]))
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
    first, by_case = lines[0], {line["case"]: line for line in lines}
    kept = (
        "step_s_spread",
        "steps_s",
        "host_operation_s",
        "context_bytes",
        "reserved_bytes",
        "losses",
        "error",
    )
    raws = [{k: line[k] for k in ("case", *kept) if k in line} for line in lines]
    judged = {row["case"]: row for row in rows}
    file = write(
        "planner_h200",
        [judged.get(case, {}) | raw_row for case, raw_row in zip(by_case, raws, strict=True)],
        device=first["device"],
        command="python benchmarks/planner_h200.py measure; python benchmarks/planner_h200.py fit",
        versions=first["versions"],
    )
    print(f"worst of {len(held)} held out: {worst_held}; of all {len(rows)}: {worst}; {file}")


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
    measuring.add_argument("--seconds", type=float, default=570.0)
    measuring.add_argument("--cases", nargs="*", default=CASES)
    verbs.add_parser("hold-out")
    verbs.add_parser("one").add_argument("names", nargs="+")
    verbs.add_parser("fit").add_argument("raw", type=Path)
    options = parser.parse_args()
    if options.verb == "one":
        for name in options.names:
            try:
                row = measure_one(read_case(name))
            except Exception as error:  # one case that fails leaves the others' results standing
                row = {"case": name, "error": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps(row), flush=True)
    elif options.verb == "hold-out":
        HELD_OUT_FILE.write_text("\n".join(_held_out()) + "\n", encoding="utf-8")
    elif options.verb == "measure":
        done = set(_done(options.out))
        measure(options.out, [name for name in options.cases if name not in done], options.seconds)
    else:
        fit(options.raw)


def _held_out() -> list[str]:
    """Names of the cases that no fit sees."""
    return [name for name in CASES if read_case(name).held_out]


def _done(raw: Path) -> Iterator[str]:
    if raw.exists():
        for line in raw.read_text(encoding="utf-8").splitlines():
            if "error" not in (row := json.loads(line)):
                yield row["case"]


if __name__ == "__main__":
    main()
