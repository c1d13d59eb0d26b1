"""Requests that sample: tokens/s by how many of them do, and what draws their tokens by itself.

    python -m benchmarks.serving_sampled --work FOLDER [--set ahead=false ...]

An 8B shape with random weights, 64 requests at once over the base, 128 tokens in and out:

    greedy, one_samples, half_sample, all_sample, all_top_p, one_penalised
                        tokens/s, medians of rounds in turn; the last one waits for the host
    drawn               us of the kernel, and of sorting in its place, for 1 and 64 rows of logits
                        that were just written, by kind of limit

Writes results/serving_sampled.json (not with --tiny, which is for a CPU).
"""

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.h200_serving import settings_of
from benchmarks.results import write
from benchmarks.serving_load import Load, draw_load
from benchmarks.serving_world import random_weights, save_base
from benchmarks.training_runs import EIGHT_B, TINY
from tunefork.kernels.draw import draw, draw_by_sorting
from tunefork.model.device import describe, pick_device
from tunefork.serve.engine import EngineRequest, Sampling
from tunefork.serve.engines.choose import Choice, draw_rows, greedy
from tunefork.serve.engines.embedded import EmbeddedEngine

_ROUNDS, _TIMES = 6, 25
_LIMITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "both": {"top_k": 50, "top_p": 0.9},
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    shape = TINY if arguments.tiny else EIGHT_B
    save_base(arguments.work / "base", shape)
    load = draw_load(*((8, 16, 12) if arguments.tiny else (64, 128, 128)), shape.vocabulary)
    settings = settings_of(arguments.work / "base", arguments, slots=4)
    rows = [_drawn(shape.vocabulary)] if torch.cuda.is_available() else []
    with random_weights():
        rows += asyncio.run(_rates(EmbeddedEngine(settings), load))
    for row in rows:
        print(json.dumps(row), flush=True)
    if not arguments.tiny:
        print(write("serving_sampled", rows, device=str(describe(pick_device())["name"])))


async def _rates(engine: EmbeddedEngine, load: Load) -> list[dict[str, Any]]:
    most = len(load.prompts)
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "greedy": (0, {}),
        "one_samples": (1, {}),
        "half_sample": (most // 2, {}),
        "all_sample": (most, {}),
        "all_top_p": (most, {"top_p": 0.9}),
        "one_penalised": (1, {"presence_penalty": 0.1}),
    }
    await engine.start()
    rates: dict[str, list[float]] = {case: [] for case in cases}
    for turn in range(_ROUNDS + 1):  # in turn, so that all see the same machine
        for case, (sampled, how) in cases.items():
            began = time.perf_counter()
            await asyncio.gather(
                *(
                    _one(engine, load, f"{case}-{turn}-{at}", at, how if at < sampled else None)
                    for at in range(most)
                )
            )
            if turn:
                rates[case].append(most * load.new / (time.perf_counter() - began))
    info = dict(engine.info())
    await engine.stop()
    return [
        {"case": case, "tool": "tunefork", "ours": True, "tokens_per_s": round(median, 1)} | info
        for case, median in ((case, statistics.median(found)) for case, found in rates.items())
    ]


async def _one(
    engine: EmbeddedEngine, load: Load, name: str, at: int, how: dict[str, Any] | None
) -> None:
    """`how` it samples; None: greedily."""
    chosen = {"temperature": 0.0} if how is None else {"temperature": 1.0, "seed": at, **how}
    sampling = Sampling(max_tokens=load.new, ignore_eos=True, **chosen)
    async for _ in engine.generate(EngineRequest(name, load.prompts[at], sampling, None)):
        pass


def _drawn(vocabulary: int) -> dict[str, Any]:
    made, found = torch.Generator("cuda").manual_seed(0), dict[str, Any]()
    for shape, spread in (("flat", 0.5), ("peaked", 4.0)):
        logits = torch.randn(64, vocabulary, device="cuda", generator=made).mul(spread).bfloat16()
        for kind, limits in _LIMITS.items():
            for rows in (1, 64):
                told = {row: Choice(1.0, uniform=(row + 0.5) / 64, **limits) for row in range(rows)}
                for by in (draw, draw_by_sorting):
                    took = [_us(logits, told, by) for _ in range(_TIMES)]
                    found[f"{by.__name__} {shape} {kind} {rows}"] = round(
                        statistics.median(took), 1
                    )
    return {"case": "drawn", "tool": "tunefork", "ours": True, "us": found}


def _us(logits: torch.Tensor, told: dict[int, Choice], by: Any) -> float:
    tokens = greedy(logits)
    logits.add_(0)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10**7)  # what is measured is launched meanwhile
    begin.record()  # type: ignore[no-untyped-call]
    draw_rows(logits, tokens, told, by)
    end.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return 1e3 * float(begin.elapsed_time(end))


if __name__ == "__main__":
    main()
