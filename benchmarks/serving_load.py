"""Requests for an embedded engine, all at once or one after the other, and what they took."""

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunefork.serve.engine import EngineRequest, Sampling, ServedAdapter
from tunefork.serve.engines.embedded import EmbeddedEngine


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one answer, in seconds."""

    first: float
    """Until its first token."""
    gaps: tuple[float, ...]
    """Between pieces."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts that are asked at the same time, and how long answers are."""

    prompts: tuple[tuple[int, ...], ...]
    new: int


def draw_load(requests: int, prompt: int, new: int, vocabulary: int, seed: int = 0) -> Load:
    """Random tokens, so that no two prompts begin alike."""
    import random

    chosen = random.Random(seed)
    prompts = [[chosen.randrange(10, vocabulary) for _ in range(prompt)] for _ in range(requests)]
    return Load(tuple(map(tuple, prompts)), new)


async def answer(
    engine: EmbeddedEngine,
    name: str,
    prompt: Sequence[int],
    new: int,
    adapter: ServedAdapter | None,
) -> Timing:
    """Ask greedily for exactly `new` tokens."""
    sampling = Sampling(max_tokens=new, temperature=0.0, ignore_eos=True)
    wanted = EngineRequest(name, tuple(prompt), sampling, adapter)
    began = last = time.perf_counter()
    first, gaps, tokens = 0.0, [], 0
    async for piece in engine.generate(wanted):
        now = time.perf_counter()
        if tokens:
            gaps.append(now - last)
        else:
            first = now - began
        tokens, last = tokens + len(piece.token_ids), now
    if tokens != new:
        raise RuntimeError(f"{name}: {tokens} tokens in place of {new}")
    return Timing(first, tuple(gaps), tokens)


async def round_of(
    engine: EmbeddedEngine, load: Load, adapters: Sequence[ServedAdapter], name: str
) -> tuple[float, list[Timing]]:
    """All prompts at once, over `adapters` in turn (none: the base). Seconds, and each timing."""
    began = time.perf_counter()
    whose = [adapters[at % len(adapters)] if adapters else None for at in range(len(load.prompts))]
    timings = await asyncio.gather(
        *(
            answer(engine, f"{name}-{at}", prompt, load.new, whose[at])
            for at, prompt in enumerate(load.prompts)
        )
    )
    return time.perf_counter() - began, list(timings)


def row(
    case: str, load: Load, rounds: Sequence[tuple[float, list[Timing]]], **more: Any
) -> dict[str, Any]:
    """A speed row: the median of rounds, and what single requests saw in them."""
    total = len(load.prompts) * load.new
    rates = sorted(total / seconds for seconds, _ in rounds)
    timings = [timing for _, found in rounds for timing in found]
    gaps = [gap for timing in timings for gap in timing.gaps]
    median = statistics.median(rates)
    return {
        "case": case,
        "tool": "tunefork",
        "ours": True,
        "tokens_per_s": round(median, 1),
        "spread": round((rates[-1] - rates[0]) / median, 4),
        "first_token_ms": percentiles([timing.first for timing in timings]),
        "token_ms": percentiles(gaps),
        **more,
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    last = len(ordered) - 1
    return {f"p{p}": round(1000 * ordered[round(p / 100 * last)], 2) for p in (50, 95, 99)}
