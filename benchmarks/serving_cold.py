"""An adapter that was never seen before, asked for while others decode."""

import asyncio
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.serving_load import Load, answer, percentiles
from tunefork.serve.engine import EngineRequest, Sampling, ServedAdapter
from tunefork.serve.engines.embedded import EmbeddedEngine


async def cold_adapter(
    engine: EmbeddedEngine, load: Load, warm: list[ServedAdapter], cold: ServedAdapter
) -> dict[str, Any]:
    """The first request for `cold` in the middle of a round over `warm`."""
    stamps: list[float] = []
    others = Load(load.prompts[:-1], load.new)

    async def watch(at: int, prompt: tuple[int, ...]) -> None:
        sampling = Sampling(max_tokens=load.new, temperature=0.0, ignore_eos=True)
        wanted = EngineRequest(f"watch-{at}", prompt, sampling, warm[at % len(warm)])
        async for _ in engine.generate(wanted):
            if at == 0:
                stamps.append(time.perf_counter())

    for file in cold.folder.iterdir():
        _drop_from_page_cache(file)
    tasks = [asyncio.ensure_future(watch(at, prompt)) for at, prompt in enumerate(others.prompts)]
    while len(stamps) < load.new // 3:
        await asyncio.sleep(0.001)
    asked = time.perf_counter()
    timing = await answer(engine, "cold", load.prompts[-1], max(4, load.new // 8), cold)
    arrived = asked + timing.first
    await asyncio.gather(*tasks)
    gaps = [(later, later - one) for one, later in pairwise(stamps)]
    before = [gap for at, gap in gaps[2:] if at < asked]
    # The new one's own prompt, like any other, takes part in a pass of its own length.
    meanwhile = [gap for at, gap in gaps if asked <= at < arrived]
    found = {
        "case": "cold",
        "tool": "tunefork",
        "ours": True,
        "first_token_ms": round(1000 * timing.first, 1),
        "others_token_ms_before": percentiles(before),
        "others_token_ms_meanwhile": percentiles(meanwhile),
        "mean_ratio": round((sum(meanwhile) / len(meanwhile)) / (sum(before) / len(before)), 3)
        if meanwhile and before
        else None,
    }
    print(json.dumps(found), flush=True)
    return found


def _drop_from_page_cache(file: Path) -> None:
    """So that it is read from the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
