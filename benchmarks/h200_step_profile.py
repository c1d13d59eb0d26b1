"""Where the time of one training step goes on a GPU: kernel by kernel, and the pauses between them.

    python -m benchmarks.h200_step_profile CASE... [--top 40]

CASE is a name of `planner_cases.py` (8b-lora-8x2048): a real run of its shape with random weights
and tokens, by the code that `tunefork train` runs. Two of its steps are profiled; a row's figures
are of one. Writes results/h200_step_profile.json, a row a case; on a CPU it only prints.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.planner_cases import build_of, config, lengths, read_case
from benchmarks.results import write
from benchmarks.training_runs import pick
from tunefork.plan import short_run

_BEFORE, _PROFILED, _AFTER = 4, 2, 4
"""Steps: kernels are compiled and captured in the first, the last show what profiling cost."""
PAUSES_US = (1.0, 2.0, 5.0, 20.0, 100.0)
"""Pauses are counted by length, up to each of these, and longer."""


def measure(name: str, top: int) -> dict[str, Any]:
    """Train, and profile two steps on the way."""
    case, device, began = read_case(name), pick(), time.perf_counter()
    is_cuda = device.type == "cuda"
    kinds = [ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]
    profiler, done = profile(activities=kinds), itertools.count(1)

    def watched(train: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, on_step: Callable[[Any], None], **options: Any) -> Any:
            def step(record: Any) -> None:
                on_step(record)  # which waits for the GPU
                number = next(done)
                if number == _BEFORE:
                    profiler.start()
                elif number == _BEFORE + _PROFILED:
                    profiler.stop()

            return train(*args, on_step=step, **options)

        return run

    with patch.object(short_run, "train", watched(short_run.train)):
        measured = short_run.short_run(
            config(case.shape),
            build_of(case),
            lengths(case)[: _BEFORE + _PROFILED + _AFTER],
            micro_batch_tokens=case.rows * case.length,
            packing=case.packed,
            device=device,
        )
    return {
        "case": name,
        "steps_ms": [round(1000 * seconds, 1) for seconds in measured.steps_s],
        **(_timeline(profiler.events() or ()) if is_cuda else {}),
        "kernels": _kernels(profiler, top, is_cuda=is_cuda),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _timeline(events: Iterable[Any]) -> dict[str, Any]:
    """How long the GPU was busy, and how long it paused, in ms of one step."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if str(event.device_type).endswith("CUDA")
    )
    count, total, end = [0] * (len(PAUSES_US) + 1), [0.0] * (len(PAUSES_US) + 1), spans[0][1]
    for begin, last in spans[1:]:
        if begin > end:
            kind = sum(begin - end > most for most in PAUSES_US)
            count[kind] += 1
            total[kind] += begin - end
        end = max(end, last)
    span = end - spans[0][0]
    names = [*(f"up to {most:g} us" for most in PAUSES_US), "longer"]
    return {
        "span_ms": round(span / 1000 / _PROFILED, 2),
        "busy_ms": round((span - sum(total)) / 1000 / _PROFILED, 2),
        "events": len(spans) // _PROFILED,
        "pauses": {
            name: {"count": number / _PROFILED, "ms": round(us / 1000 / _PROFILED, 3)}
            for name, number, us in zip(names, count, total, strict=True)
        },
    }


def _kernels(profiler: Any, top: int, *, is_cuda: bool) -> list[dict[str, Any]]:
    """The longest, by their time in a step."""
    attribute = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    rows = [(getattr(row, attribute), row.count, row.key) for row in profiler.key_averages()]
    return [
        {
            "ms": round(us / 1000 / _PROFILED, 2),
            "count": count / _PROFILED,
            "name": name[:100],
        }
        for us, count, name in sorted(rows, reverse=True)[:top]
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--top", type=int, default=40)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.cases:
        rows.append(measure(name, arguments.top))
        told = {key: value for key, value in rows[-1].items() if key != "kernels"}
        print(told, *rows[-1]["kernels"], sep="\n", flush=True)
        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if torch.cuda.is_available():
        print(write("h200_step_profile", rows, device=torch.cuda.get_device_name()))


if __name__ == "__main__":
    main()
