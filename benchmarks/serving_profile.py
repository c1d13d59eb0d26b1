"""Where a decoding step's time goes on a GPU: its kernels, and how long it does nothing."""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.serving_load import Load
from tunefork.serve.engine import EngineRequest, Sampling, ServedAdapter
from tunefork.serve.engines.embedded import EmbeddedEngine

_WINDOW_S = 0.15
_MOST_KERNELS = 24


async def profile(
    engine: EmbeddedEngine, load: Load, adapters: Sequence[ServedAdapter], name: str
) -> dict[str, Any]:
    """A row: of the middle of a round, by step, the kernels that take longest."""
    steps = 0

    async def one(at: int, prompt: tuple[int, ...]) -> None:
        nonlocal steps
        whose = adapters[at % len(adapters)] if adapters else None
        sampling = Sampling(max_tokens=load.new, temperature=0.0, ignore_eos=True)
        async for _ in engine.generate(EngineRequest(f"{name}-{at}", prompt, sampling, whose)):
            steps += at == 0

    tasks = [asyncio.ensure_future(one(at, prompt)) for at, prompt in enumerate(load.prompts)]
    while steps < load.new // 4:
        await asyncio.sleep(0.001)
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as found:
        before = steps
        await asyncio.sleep(_WINDOW_S)
        taken = max(1, steps - before)
    await asyncio.gather(*tasks)
    kernels = kernels_a_step(found, taken)
    return {
        "case": f"profile_{'adapters' if adapters else 'base'}",
        "tool": "tunefork",
        "ours": True,
        "steps": taken,
        **kernels,
        "busy_share": round(kernels["busy_ms_a_step"] * taken / 1000 / _WINDOW_S, 3),
    }


def kernels_a_step(found: Any, steps: int) -> dict[str, Any]:
    """Of a profile of so many steps: what of them is in a row."""
    kernels = [one for one in found.key_averages() if one.self_device_time_total > 0]
    kernels.sort(key=lambda one: -one.self_device_time_total)
    busy_us = sum(one.self_device_time_total for one in kernels)
    return {
        "kernels_a_step": round(sum(one.count for one in kernels) / steps),
        "busy_ms_a_step": round(busy_us / 1000 / steps, 3),
        "kernels": [_told(one, steps) for one in kernels[:_MOST_KERNELS]],
    }


def _told(kernel: Any, steps: int) -> str:
    us, count = kernel.self_device_time_total / steps, kernel.count / steps
    return f"{us:8.1f} us {count:6.1f} x {kernel.key[:90]}"
