"""Forms of a captured pass with prompts, one engine, one after the other: what each is worth.

    python -m benchmarks.serving_forms --work FOLDER [--set slots=9 ...]

An 8B shape with random weights and 33 slots of rank 16, by default. Cases:

    all        decoding rows read apart, and adapters of few tokens: medians in ms, from numbers on
               the host to tokens there; how far logits are from those of a launched pass, as a part
               of the largest; kernels of one pass
    as_one     without the first of these; by_tiles: without the second; neither
    checks     ms of what the engine checks when it starts, once all is compiled
    trials     as `all` with a trial's rows, and in how many of passes of any make-up an adapter
               without effect seems to have one

Writes results/serving_forms.json (not with --tiny, which is for a CPU: passes are launched there).
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.h200_serving import ADAPTERS, settings_of
from benchmarks.results import write
from benchmarks.serving_profile import kernels_a_step
from benchmarks.serving_world import random_weights, save_base
from benchmarks.training_runs import EIGHT_B, TINY
from tunefork.model.device import describe, pick_device
from tunefork.serve.engines.checked import Checks
from tunefork.serve.engines.core import Core
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.layout import BASE, Part
from tunefork.serve.engines.trial import ROOM, TRIED, rows_of

_MIXES: dict[str, tuple[int, list[int]]] = {
    "64_rows": (64, []),
    "63_rows_and_128": (63, [128]),
    "63_rows_and_64": (63, [64]),
    "60_rows_and_4_x_64": (60, [64] * 4),
    "63_rows_and_448": (63, [448]),
    "63_rows_and_700": (63, [700]),
    "63_rows_and_1900": (63, [1900]),
}
"""Rows that decode, and prompts beside them."""
_PROFILED = "63_rows_and_128"
_USED, _TIMES, _TRIALS = 192, 30, 300
"""Tokens that a decoding row sees; passes of a case; passes with a trial."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    save_base(arguments.work / "base", TINY if arguments.tiny else EIGHT_B)
    settings = settings_of(arguments.work / "base", arguments, slots=ADAPTERS + 1)
    with random_weights():
        rows = asyncio.run(_measured(EmbeddedEngine(settings)))
    if not arguments.tiny:
        print(write("serving_forms", rows, device=str(describe(pick_device())["name"])))


async def _measured(engine: EmbeddedEngine) -> list[dict[str, Any]]:
    began = time.perf_counter()
    await engine.start()
    start_s = round(time.perf_counter() - began, 1)
    assert engine._parts is not None
    core = engine._parts.core
    with torch.inference_mode():
        rows = [_checks(core)] if core.passes.graphs else []
        _fill(core)
        few = core.passes.layout.few
        forms = {"all": (True, few), "as_one": (False, few), "by_tiles": (True, 0)}
        for name, (apart, most) in (forms | {"neither": (False, 0)}).items():
            core.passes.read_as_one()
            core.passes.apart, core.passes.layout.few = apart, most
            rows.append(_form(core, name))
            print(json.dumps(rows[-1], indent=1), flush=True)
        core.passes.read_as_one()
        core.passes.apart, core.passes.layout.few = forms["all"]
        rows.append(_trials(core))
        print(json.dumps(rows[-1]), flush=True)
    info = dict(engine.info())
    await engine.stop()
    return [row | {"tool": "tunefork", "ours": True, "start_s": start_s} | info for row in rows]


def _checks(core: Core) -> dict[str, Any]:
    """While slots and cache are empty."""
    passes, cache, slots = core.passes, core.cache, core.tiers and core.tiers.slots
    checks = Checks(passes.device, passes.model.dtype)
    vocabulary = passes.model.get_output_embeddings().weight.shape[0]
    found: dict[str, Callable[[], Any]] = {
        "draw_ms": lambda: checks.draw(vocabulary),
        "reads_apart_ms": lambda: checks.reads_apart(cache.layers, passes.groups),
        "mixes_ms": lambda: checks.mixes(slots.bank, passes.max_rows + TRIED),
        "captured_ms": lambda: checks.captured(passes, cache, has_slots=True),
        "rows_are_alike_ms": lambda: checks.rows_are_alike(passes, cache),
    }
    row: dict[str, Any] = {"case": "checks"}
    for name, check in found.items():
        began = time.perf_counter()
        check()
        row[name] = round(1000 * (time.perf_counter() - began), 1)
    return row


def _fill(core: Core) -> None:
    """Numbers in the cache and in all slots but the first."""
    slots: Any = core.tiers and core.tiers.slots
    slots.ranks.update(dict.fromkeys(range(slots.num_slots), 16))
    for layer in slots.bank.layers.values():
        for rows in layer.stacks if layer.kept is None else ():
            rows.data[1:].normal_(0, 0.02)
    for pool in core.cache._pools():
        pool.normal_()


def _parts(core: Core, rows: int, prompts: Sequence[int], slots: Sequence[int]) -> list[Part]:
    """Rows that decode, neighbours of the same slot, then prompts."""
    room = core.cache.total // max(1, rows + len(prompts))
    most = min(room, (core.passes.max_tokens - ROOM) // max(1, len(prompts)))
    lengths = [(1, min(_USED, room) - 1)] * rows + [(min(new, most), 0) for new in prompts]
    return [
        Part(
            [10 + (at + one) % 80 for one in range(new)],
            before,
            64 + at * room,
            slots[at * len(slots) // len(lengths)],
            wants_logits=True,
        )
        for at, (new, before) in enumerate(lengths)
    ]


def _form(core: Core, name: str) -> dict[str, Any]:
    passes, found = core.passes, dict[str, Any]()
    slots = range(1, core.tiers.slots.num_slots) if core.tiers else [BASE]
    for mix, (rows, prompts) in _MIXES.items():
        parts = _parts(core, min(rows, passes.max_rows - len(prompts)), prompts, slots)
        found[f"{mix}_ms"] = _median_ms(core, parts)
        logits_rv, graphs = passes.run(parts).logits_rv.float().clone(), passes.graphs
        passes.graphs = None
        exact_rv = passes.run(parts).logits_rv.float()
        passes.graphs = graphs
        apart = (logits_rv - exact_rv).abs().max() / exact_rv.abs().max()
        found[f"{mix}_logits_differ"] = round(float(apart), 4)
        if mix == _PROFILED and torch.cuda.is_available():
            kinds = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=kinds) as profiled:
                _median_ms(core, parts, times=6, before=0)
            found[mix] = kernels_a_step(profiled, 6)
    return {"case": name, **found}


def _trials(core: Core) -> dict[str, Any]:
    dice, found = random.Random(0), dict[str, Any]()
    slots, tried = [*range(1, 5), BASE], rows_of(0, core.cache.trial_start)
    parts = _parts(core, core.passes.max_rows - 1, [128], slots)
    found["without_ms"] = _median_ms(core, parts)
    found["with_ms"] = _median_ms(core, [*parts, *tried])
    seem = 0
    for _ in range(_TRIALS):
        most = min(dice.choice((8, 128, 800, 2000)), core.passes.max_tokens - ROOM)
        parts = _parts(core, dice.randrange(core.passes.max_rows), [dice.randint(1, most)], slots)
        own_v, base_v = core.passes.run([*parts, *tried]).logits_rv[-TRIED:]
        seem += not torch.equal(own_v, base_v)
    return {"case": "trials", **found, "of": _TRIALS, "seem_to_have_an_effect": seem}


def _median_ms(core: Core, parts: list[Part], times: int = _TIMES, before: int = 4) -> float:
    taken = []
    for _ in range(times + before):
        began = time.perf_counter()
        core.passes.run(parts).arriving.wait()
        taken.append(time.perf_counter() - began)
    return round(1000 * statistics.median(taken[before:]), 2)


if __name__ == "__main__":
    main()
