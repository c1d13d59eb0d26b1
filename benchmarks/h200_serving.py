"""Serving on one GPU: 64 requests at once over an 8B shape, adapters against the base and vLLM.

    python -m benchmarks.h200_serving --work FOLDER [--site vllm=FOLDER] [--set slots=32 ...]

Random weights, 128 tokens in, 128 out, greedy, rank 16 on all linear layers, all in one call:

    base, 32_adapters   the embedded engine, through `generate` with texts; ratios of one engine
    vllm_*              vLLM without texts, in a process of its own (--site: where its packages lie)
    cold                adapters never seen before, one at a time, while 63 others decode: the first
                        token and where its time went; others' time per token before and meanwhile
                        (alone: --cases cold)
    1000_registered     1,000 adapters, 64 slots, 64 requests at a time by Zipf's law: first token
    passes              one pass by itself: rows that decode, with a prompt, prompts alone; captured
                        and launched kernel by kernel (--cases passes)
    profile_*           kernels of a decoding step, and how long the GPU is busy (--cases profile)

Forms of the engine are compared in one call with --variants: each is a list of settings to be
changed, as `compile=true,prefill_tokens=8192`; `plain` changes none.

Writes results/h200_serving.json (not with --tiny, which is for a CPU).
"""

import argparse
import asyncio
import dataclasses
import gc
import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import write
from benchmarks.serving_cold import cold_adapters
from benchmarks.serving_load import Load, Timing, answer, draw_load, percentiles, round_of, row
from benchmarks.serving_passes import passes
from benchmarks.serving_profile import profile
from benchmarks.serving_world import many, random_weights, save_adapters, save_base
from benchmarks.training_runs import EIGHT_B, TINY, Shape
from tunefork.model.device import describe, pick_device
from tunefork.recipe import ModelSection
from tunefork.serve.engine import ServedAdapter
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.embedded_settings import EmbeddedSettings
from tunefork.serve.settings import ServeSettings

RANK, ADAPTERS, COLD, ROUNDS = 16, 32, 4, 3


def main() -> None:
    """Measure, print and write."""
    arguments = _arguments()
    shape = TINY if arguments.tiny else EIGHT_B
    base, folder = arguments.work / "base", arguments.work / "adapters"
    save_base(base, shape)
    began = time.perf_counter()
    adapters = save_adapters(folder, shape, ADAPTERS + COLD, RANK)
    print(f"{len(adapters)} adapters written in {time.perf_counter() - began:.0f} s", flush=True)
    size = (8, 16, 12) if arguments.tiny else (64, 128, 128)
    load = draw_load(*size, shape.vocabulary)
    rows: list[dict[str, Any]] = []
    with random_weights():
        takes_speed = bool({"speed", "cold", "profile", "passes"} & set(arguments.cases))
        for variant, settings in _forms(base, arguments).items() if takes_speed else ():
            try:
                found = asyncio.run(_speed(settings, load, adapters, arguments.cases))
            except Exception as error:  # the other variants are to be measured
                traceback.print_exc()
                found = [{"case": "failed", "error": f"{type(error).__name__}: {error}"[:400]}]
            rows += [one | {"variant": variant} for one in found]
        if "registered" in arguments.cases:
            registered = many(adapters, 40 if arguments.tiny else 1000, arguments.work / "many")
            slots = 8 if arguments.tiny else 64
            settings = settings_of(base, arguments, slots=slots)
            rows.append(asyncio.run(_registered(settings, registered, shape, arguments.tiny)))
    if arguments.site:
        rows += _vllm(arguments, base, folder, load, rows)
    if not arguments.tiny:
        print(write("h200_serving", rows, device=str(describe(pick_device())["name"])))


def _forms(base: Path, arguments: argparse.Namespace) -> dict[str, ServeSettings]:
    """Variant -> settings: all of them, before anything is measured."""
    changes = {one: [] if one == "plain" else one.split(",") for one in arguments.variants}
    return {
        one: settings_of(base, arguments, slots=ADAPTERS + 1, changed=changed)
        for one, changed in changes.items()
    }


async def _speed(
    settings: ServeSettings, load: Load, adapters: list[ServedAdapter], cases: list[str]
) -> list[dict[str, Any]]:
    engine = EmbeddedEngine(settings)
    began = time.perf_counter()
    await engine.start()
    start_s = round(time.perf_counter() - began, 1)
    warm, cold = adapters[:ADAPTERS], adapters[ADAPTERS:]
    common = {"start_s": start_s, "settings": _told(settings), **engine.info()}
    await round_of(engine, load, warm, "warm-adapters")
    rows: list[dict[str, Any]] = []
    if {"speed", "profile"} & set(cases):
        rows += await _rounds(engine, load, warm, common)
    if {"speed", "cold"} & set(cases):
        rows.append(await cold_adapters(engine, load, warm, cold))
    if "passes" in cases:
        await _idle(engine)
        prompt, slots = len(load.prompts[0]), min(len(warm), len(load.prompts))
        rows.append(passes(engine, slots, prompt=prompt, used=prompt + load.new // 2) | common)
        print(json.dumps(rows[-1]), flush=True)
    if "profile" in cases and torch.cuda.is_available():
        for whose in ([], warm):
            rows.append(await profile(engine, load, whose, f"profile-{len(whose)}"))
            print(json.dumps(rows[-1], indent=1), flush=True)
    await engine.stop()
    gc.collect()
    return rows


async def _idle(engine: EmbeddedEngine) -> None:
    """Wait until nobody is answered."""
    while engine.state().running or engine.state().waiting:
        await asyncio.sleep(0.01)


async def _rounds(
    engine: EmbeddedEngine, load: Load, warm: list[ServedAdapter], common: dict[str, Any]
) -> list[dict[str, Any]]:
    """The base's row, and the adapters'."""
    await round_of(engine, load, [], "warm-base")
    kinds: dict[str, list[ServedAdapter]] = {"base": [], f"{len(warm)}_adapters": warm}
    found: dict[str, list[tuple[float, list[Timing]]]] = {case: [] for case in kinds}
    for turn in range(ROUNDS):  # in turn, so that both see the same machine
        for case, whose in kinds.items():
            found[case].append(await round_of(engine, load, whose, f"{case}-{turn}"))
    rows = [row(case, load, rounds, **common) for case, rounds in found.items()]
    rows[1]["of_base"] = round(rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"], 4)
    if torch.cuda.is_available():
        rows[1]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    for one in rows:
        print(_line(one), flush=True)
    return rows


async def _registered(
    settings: ServeSettings, adapters: list[ServedAdapter], shape: Shape, tiny: bool
) -> dict[str, Any]:
    """Closed loop: each of 64 clients asks again as soon as it has its answer."""
    engine = EmbeddedEngine(settings)
    await engine.start()
    clients, number, prompt, new = (8, 60, 8, 4) if tiny else (64, 1500, 128, 32)
    load = draw_load(number, prompt, new, shape.vocabulary, seed=1)
    chosen = random.Random(2)
    weights = [1.0 / (rank + 1) for rank in range(len(adapters))]
    whose = chosen.choices(adapters, weights, k=number)
    timings: list[Timing] = []
    queue = iter(enumerate(load.prompts))

    async def client() -> None:
        for at, ids in queue:
            timings.append(await answer(engine, f"r{at}", ids, new, whose[at]))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    state = engine.state()
    await engine.stop()
    found = {
        "case": f"{len(adapters)}_registered",
        "tool": "tunefork",
        "ours": True,
        "slots": state.slots,
        "requests": number,
        "different_adapters": len({adapter.id for adapter in whose}),
        "files_differ": min(ADAPTERS + COLD, len(adapters)),
        "first_token_ms": percentiles([timing.first for timing in timings]),
        "token_ms": percentiles([gap for timing in timings for gap in timing.gaps]),
        "tokens_per_s": round(number * new / seconds, 1),
        "loads": state.loads,
        "evictions": state.evictions,
        "load_ms_mean": {
            stage: round(1000 * seconds / max(1, state.loads), 1)
            for stage, seconds in state.load_seconds.items()
        },
        "settings": _told(settings),
    }
    print(json.dumps(found), flush=True)
    return found


def _vllm(
    arguments: argparse.Namespace, base: Path, folder: Path, load: Load, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """vLLM's rows; ours get their ratios."""
    site = dict(one.split("=", 1) for one in arguments.site)["vllm"]
    file = arguments.work / "load.json"
    file.write_text(json.dumps(dataclasses.asdict(load)))
    script = Path(__file__).with_name("serving_vllm.py")
    found = []
    for case, slots in (("base", 0), (f"{ADAPTERS}_adapters", ADAPTERS)):
        command = [sys.executable, str(script), str(base), str(folder), str(file), str(slots)]
        peer: dict[str, Any] = {"case": case, "tool": "vllm", "ours": False}
        try:
            done = subprocess.run(
                command,
                env=os.environ | {"PYTHONPATH": str(Path(site).resolve())},
                capture_output=True,
                text=True,
                timeout=arguments.limit,
            )
            said = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if said:
                peer |= json.loads(said[-1].removeprefix("RESULT "))
            else:
                peer["error"] = (done.stderr.strip().splitlines() or ["no word"])[-1][:400]
                print(done.stderr[-3000:], file=sys.stderr)
        except subprocess.TimeoutExpired:
            peer["error"] = f"not done after {arguments.limit} s"
        for one in rows:
            if one["case"] == case and "tokens_per_s" in peer:
                one["ratios"] = {"vllm": round(one["tokens_per_s"] / peer["tokens_per_s"], 3)}
        print(json.dumps(peer), flush=True)
        found.append(peer)
    return found


def settings_of(
    base: Path, arguments: argparse.Namespace, *, slots: int, changed: Sequence[str] = ()
) -> ServeSettings:
    embedded: dict[str, Any] = {
        "slots": slots,
        "max_rank": RANK,
        "max_requests": 64,
        "max_model_len": 2048,
        "host_memory_bytes": 24 * 2**30,
    }
    for one in (*arguments.set, *changed):
        key, _, value = one.partition("=")
        embedded[key] = json.loads(value) if value[:1] in "0123456789tf" else value
    return ServeSettings(
        base=ModelSection(id=str(base)), embedded=EmbeddedSettings.model_validate(embedded)
    )


def _told(settings: ServeSettings) -> dict[str, Any]:
    return settings.embedded.model_dump(exclude_defaults=True)


def _line(one: dict[str, Any]) -> str:
    return (
        f"{one['case']:14s} {one['tokens_per_s']:,.0f} tokens/s, first token "
        f"{one['first_token_ms']} ms, per token {one['token_ms']} ms, started in {one['start_s']} s"
        + (f", {one['of_base']:.3f} of base" if "of_base" in one else "")
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="for the base and the adapters")
    parser.add_argument("--site", nargs="+", default=[], metavar="vllm=FOLDER")
    parser.add_argument("--cases", nargs="+", default=["speed", "registered"])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="embedded.KEY")
    parser.add_argument("--variants", nargs="+", default=["plain"], metavar="KEY=VALUE,...")
    parser.add_argument("--limit", type=float, default=190.0, help="seconds for one run of vLLM")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, nothing is written")
    return parser.parse_args()


if __name__ == "__main__":
    main()
