"""Serving on a CPU: 16 requests at once over 8 adapters of SmolLM2-135M, against PEFT and the base.

    python -m benchmarks.cpu_serving [--dtype bf16] [--rounds 3] [--threads 2]

128 tokens in, 64 out, greedy, adapters of rank 16 on all linear layers (tunefork's defaults). In
one process and in turn, so that all see the same machine: the embedded engine over the base alone
and over 8 adapters, three times and in either order, then PEFT's `generate` over one batch with
`adapter_names`, in the same dtype. A machine's speed changes within minutes, so a ratio is the
median of those between neighbours, and its spread is theirs. Times are of the wall;
`cpu_tokens_per_s` is by the process's own processor time, which other work on the machine changes
less. PEFT runs in threads that end, as whatever computes beside the engine in a server
(`serve/engines/cores.py`). Writes results/cpu_serving.json.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.results import write
from benchmarks.serving_load import Load, Timing, draw_load, round_of, row
from tunefork.model.device import describe, has_fast_bf16
from tunefork.model.load import find
from tunefork.recipe import ModelSection
from tunefork.serve.engine import ServedAdapter
from tunefork.serve.engines.cores import in_a_thread
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.embedded_settings import EmbeddedSettings
from tunefork.serve.settings import ServeSettings

BASE = "smollm2-135m-instruct"
REQUESTS, PROMPT, NEW = 16, 128, 64
ADAPTERS = 8
PAIRS = 3
"""Of the base and the adapters, to a round."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = arguments.dtype or ("bf16" if has_fast_bf16() else "fp32")
    with TemporaryDirectory() as folder:
        rows = asyncio.run(_measure(Path(folder), dtype, arguments.rank, arguments.rounds))
    device = describe(torch.device("cpu"))
    name = f"{device['name']}, {arguments.threads} threads"
    if not arguments.dry:
        print(write("cpu_serving", rows, device=name))


async def _measure(folder: Path, dtype: str, rank: int, rounds: int) -> list[dict[str, Any]]:
    adapters = await in_a_thread(lambda: _save_adapters(folder, rank))
    load = draw_load(REQUESTS, PROMPT, NEW, 40_000)
    fields = {"device": "cpu", "dtype": dtype, "slots": ADAPTERS, "max_rank": rank}
    embedded = EmbeddedSettings.model_validate(fields | {"max_model_len": 1024})
    engine = EmbeddedEngine(ServeSettings(base=ModelSection(id=BASE), embedded=embedded))
    await engine.start()
    peft = await in_a_thread(lambda: _peft(adapters, dtype))
    await round_of(engine, load, adapters, "warm")  # adapters are read and checked here
    taken: dict[str, list[tuple[float, list[Timing]]]] = {"base": [], "8_adapters": []}
    cpu: dict[str, list[float]] = {"base": [], "8_adapters": [], "peft": []}
    seconds: list[float] = []
    for turn in range(rounds):
        cases = [("base", []), ("8_adapters", adapters)]
        for again in range(PAIRS):
            for case, whose in cases if again % 2 else cases[::-1]:
                began = time.process_time()
                taken[case].append(await round_of(engine, load, whose, f"{case}-{turn}-{again}"))
                cpu[case].append(time.process_time() - began)
        began, wall = time.process_time(), time.perf_counter()
        await in_a_thread(lambda: _generate(peft, load, adapters))
        seconds.append(time.perf_counter() - wall)
        cpu["peft"].append(time.process_time() - began)
    await engine.stop()
    common = {"dtype": dtype, "rank": rank}
    rows = [row(case, load, found, **common) for case, found in taken.items()]
    rows.append(row("8_adapters", load, [(one, []) for one in seconds], **common))
    rows[2] |= {"tool": "peft", "ours": False}
    total = REQUESTS * NEW
    for one, case in zip(rows, cpu, strict=True):
        one["cpu_tokens_per_s"] = round(total / statistics.median(cpu[case]), 1)
    wall_s = {case: [took for took, _ in found] for case, found in taken.items()} | {
        "peft": seconds
    }
    for prefix, by_case in (("", wall_s), ("cpu_", cpu)):
        ours, base, theirs = by_case["8_adapters"], by_case["base"], by_case["peft"]
        nearest = [one for one in theirs for _ in range(PAIRS)]
        rows[1][f"{prefix}of_base"] = _ratio(base, ours)
        rows[1][f"{prefix}ratios"] = {"peft": _ratio(nearest, ours)}
    for one in rows:
        print(one, flush=True)
    return rows


def _ratio(theirs_s: Sequence[float], ours_s: Sequence[float]) -> dict[str, float]:
    """How many times as fast ours is: of each pair of neighbours."""
    found = sorted(one / other for one, other in zip(theirs_s, ours_s, strict=True))
    rounded = [round(value, 3) for value in (statistics.median(found), found[0], found[-1])]
    return dict(zip(("median", "least", "most"), rounded, strict=True))


def _save_adapters(folder: Path, rank: int) -> list[ServedAdapter]:
    location = find(ModelSection(id=BASE)).location
    model: Any = AutoModelForCausalLM.from_pretrained(location)
    found = []
    for at in range(ADAPTERS):
        torch.manual_seed(at)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.01 * torch.randn_like(parameter)
        wrapped.save_pretrained(folder / f"a{at}")
        found.append(ServedAdapter(f"a{at}:v1", folder / f"a{at}", rank, 0))
        model = wrapped.unload()
    return found


def _peft(adapters: Sequence[ServedAdapter], dtype: str) -> Any:
    location = find(ModelSection(id=BASE)).location
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(location, dtype=wanted)
    model: Any = PeftModel.from_pretrained(base, adapters[0].folder, adapter_name=_name(0))
    for at, adapter in enumerate(adapters[1:], start=1):
        model.load_adapter(adapter.folder, adapter_name=_name(at))
    return model.to(wanted).eval()


def _name(at: int) -> str:
    return f"adapter{at}"


@torch.inference_mode()
def _generate(model: Any, load: Load, adapters: Sequence[ServedAdapter]) -> None:
    ids = torch.tensor(load.prompts)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=load.new,
        min_new_tokens=load.new,
        do_sample=False,
        pad_token_id=0,
        adapter_names=[_name(at % len(adapters)) for at in range(len(load.prompts))],
    )
    if out.shape != (len(load.prompts), PROMPT + load.new):
        raise RuntimeError(f"PEFT gave {tuple(out.shape)}")


if __name__ == "__main__":
    main()
