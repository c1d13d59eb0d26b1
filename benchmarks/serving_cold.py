"""Adapters that were never seen before, each asked for while others decode."""

import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.serving_load import Load, answer, percentiles
from tunefork.serve.engine import EngineRequest, Sampling, ServedAdapter
from tunefork.serve.engines.embedded import EmbeddedEngine


async def cold_adapters(
    engine: EmbeddedEngine, load: Load, warm: list[ServedAdapter], cold: list[ServedAdapter]
) -> dict[str, Any]:
    """Of each of `cold` the first request, in the middle of a round over `warm`.

    All are read from the disk but the last, whose file is left in the page cache. The trial is in
    the pass of the prompt: `trial_ms`, from that pass's launch to the verdict, is also a part of
    `prompt_ms`, and of what the pass before it takes.

    `ratio` is of means of the others' time per token: from the cold request's arrival to its first
    token, the pass of its prompt included, over passes before that do nothing but decode.
    """
    rounds = []
    for at, one in enumerate(cold):
        is_cached = at == len(cold) - 1
        for file in () if is_cached else one.folder.iterdir():
            _drop_from_page_cache(file)
        found = await _round(engine, load, warm, one)
        rounds.append({"read_from": "page cache" if is_cached else "disk"} | found)
    from_disk = rounds[:-1] or rounds
    row = {"case": "cold", "tool": "tunefork", "ours": True, "rounds": rounds} | {
        key: statistics.median(one[key] for one in from_disk) for key in ("first_token_ms", "ratio")
    }
    print(json.dumps(row), flush=True)
    return row


async def _round(
    engine: EmbeddedEngine, load: Load, warm: list[ServedAdapter], cold: ServedAdapter
) -> dict[str, Any]:
    stamps: list[list[float]] = [[] for _ in load.prompts[:-1]]
    came, ended = asyncio.Event(), list[int]()

    async def watch(at: int, prompt: tuple[int, ...]) -> None:
        sampling = Sampling(max_tokens=load.new, temperature=0.0, ignore_eos=True)
        wanted = EngineRequest(f"{cold.id}-{at}", prompt, sampling, warm[at % len(warm)])
        try:
            async for _ in engine.generate(wanted):
                stamps[at].append(time.perf_counter())
                if at == 0:
                    came.set()
        finally:
            ended.append(at)
            came.set()

    async def until(is_so: Callable[[], bool]) -> None:
        while not is_so() and not ended:
            came.clear()
            await came.wait()

    others = enumerate(load.prompts[:-1])
    tasks = [asyncio.ensure_future(watch(at, prompt)) for at, prompt in others]
    few, stretch = max(2, load.new // 16), load.new // 3
    await until(lambda: min(map(len, stamps)) >= few)  # until then passes have prompts in them
    decoding, last = time.perf_counter(), len(stamps[0]) + stretch
    await until(lambda: len(stamps[0]) >= last)
    spent = engine.state().load_seconds
    asked = time.perf_counter()
    timing = await answer(engine, cold.id, load.prompts[-1], max(4, load.new // 8), cold)
    stages = {
        f"{stage}_ms": 1000 * (seconds - spent[stage])
        for stage, seconds in engine.state().load_seconds.items()
    }
    arrived = asked + timing.first
    await asyncio.gather(*tasks)
    before, loading, its_pass = list[float](), list[float](), list[float]()
    for one in stamps:
        gaps = [(later, later - sooner) for sooner, later in pairwise(one)]
        # The pass with the new one's prompt ends when its first token comes.
        end, took = min(gaps, key=lambda gap: abs(gap[0] - arrived))
        before += [gap for at, gap in gaps if at - gap >= decoding and at < asked]
        loading += [gap for at, gap in gaps if asked <= at < end]
        its_pass.append(took)
    meanwhile = [*loading, *its_pass]
    stages["prompt_ms"] = 1000 * statistics.median(its_pass)
    first_token_ms = 1000 * timing.first
    return {
        "first_token_ms": round(first_token_ms, 1),
        **{stage: round(took, 1) for stage, took in stages.items()},
        "waited_ms": round(first_token_ms - sum(stages.values()) + stages["trial_ms"], 1),
        "others_token_ms_before": _told(before),
        "others_token_ms_meanwhile": _told(meanwhile),
        "others_longest_ms": round(1000 * max(meanwhile), 1),
        "others_ended_before": min(one[-1] for one in stamps) < arrived,  # then they saw less
        "ratio": _ratio(meanwhile, before),
        # Any request's prompt, also one for an adapter that is there, is a pass of its own length.
        "ratio_without_its_prompt": _ratio(loading, before),
    }


def _told(gaps: list[float]) -> dict[str, float]:
    mean = {"mean": round(1000 * statistics.mean(gaps), 2)} if gaps else {}
    return mean | percentiles(gaps)


def _ratio(gaps: list[float], before: list[float]) -> float:
    if not gaps or not before:
        return float("nan")
    return round(statistics.mean(gaps) / statistics.mean(before), 3)


def _drop_from_page_cache(file: Path) -> None:
    """So that it is read from the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
