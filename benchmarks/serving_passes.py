"""How long one pass takes, captured and launched kernel by kernel: no request, no text."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.serving_profile import kernels_a_step
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.graphs import Graphs
from tunefork.serve.engines.layout import Part
from tunefork.serve.engines.passes import Passes

_TIMES, _FEWER = 20, 6
"""Passes of a case: captured, and launched."""
_BEFORE = 2
"""Others before them."""


@torch.inference_mode()
def passes(engine: EmbeddedEngine, slots: int, *, prompt: int, used: int) -> dict[str, Any]:
    """A row: medians in ms of a pass over rows that decode, such rows and one prompt of `prompt`
    tokens, and as many prompts' tokens as a pass may have, in one and in several prompts; each from
    its numbers on the host to its tokens there. And the kernels of the second of these.

    `used`: tokens that each decoding row sees. Rows have the adapters of the first `slots` slots,
    neighbours the same, as the scheduler has them. The engine must be idle: its cache is written.
    """
    assert engine._parts is not None
    core = engine._parts.core
    rows, most = core.scheduler.max_requests, core.scheduler.prefill_tokens
    long = min(most, engine._parts.max_model_len)

    def parts(*lengths: tuple[int, int]) -> list[Part]:
        """(new tokens, tokens before them) of each row."""
        room = core.cache.total // len(lengths)
        return [
            Part([10 + at] * new, before, at * room, at * slots // len(lengths), True)
            for at, (new, before) in enumerate(lengths)
        ]

    mixed = f"{rows - 1}_rows_and_{prompt}"
    mixes = {
        f"{rows}_rows": parts(*[(1, used - 1)] * rows),
        mixed: parts(*[(1, used - 1)] * (rows - 1), (prompt, 0)),
        f"{long}_alone": parts((long, 0)),
        f"{most // prompt}_prompts": parts(*[(prompt, 0)] * min(rows, most // prompt)),
    }
    found: dict[str, Any] = {}
    for name, mix in mixes.items():
        graphs = core.passes.graphs
        if graphs is not None and graphs.is_on:
            found[f"{name}_ms"] = _median_ms(core.passes, mix, _TIMES)
            with _launched(graphs):
                found[f"{name}_launched_ms"] = _median_ms(core.passes, mix, _FEWER)
        else:
            found[f"{name}_launched_ms"] = _median_ms(core.passes, mix, _FEWER)
    if torch.cuda.is_available():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            _median_ms(core.passes, mixes[mixed], _FEWER)
        found[mixed] = kernels_a_step(profiled, _FEWER + _BEFORE)
    return {"case": "passes", "tool": "tunefork", "ours": True, "used": used, **found}


def _median_ms(passes: Passes, parts: list[Part], times: int) -> float:
    taken = []
    for _ in range(times + _BEFORE):
        began = time.perf_counter()
        passes.run(parts).tokens_r.tolist()
        taken.append(time.perf_counter() - began)
    return round(1000 * statistics.median(taken[_BEFORE:]), 2)


@contextmanager
def _launched(graphs: Graphs) -> Iterator[None]:
    """Within, passes are launched, as where `embedded.cuda_graphs` is off."""
    graphs.is_on = False
    try:
        yield
    finally:
        graphs.is_on = True
