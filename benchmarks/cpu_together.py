"""Many adapters in one pass on a CPU: tokens/s of a tunefork group beside PEFT runs in turn.

SmolLM2-135M, 8 adapters (ranks 8, 16, 32 and 64, twice) on all linear layers, a step of 4 x 64
tokens of each, every token supervised, bf16, the same threads. The group trains all eight in one
pass of 2,048 tokens; PEFT trains them one after the other, each in passes of its own 256. A figure
is tokens over time: for the group of the median step, for PEFT of the sum of each adapter's median
step. Each tool runs in a process of its own, the tools take turns, `--rounds` times over. Both
start from the same adapter files and see the same batches, so the first 20 losses of every adapter
must agree: a fast wrong kernel would show there.

PEFT runs twice: with its default fp32 adapters, which it multiplies in fp32, and with adapters in
bf16, its faster setting. `peak_gib` is the most memory held from the first step on.

    python benchmarks/cpu_together.py [--rounds 2] [--steps 12]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.results import write
from tunefork.data.example import Encoded
from tunefork.model.bank import BankAdapter, add_bank
from tunefork.model.device import describe, peak_bytes, reset_peak
from tunefork.model.load import find, load_model
from tunefork.recipe import LoraSection, ModelSection
from tunefork.registry.peft_save import save_deltas
from tunefork.train.member import Member, MemberStep
from tunefork.train.together import Group, GroupSettings

MODEL = ModelSection(id="smollm2-135m-instruct")
RANKS = (8, 16, 32, 64, 8, 16, 32, 64)
BATCH, LENGTH, LEARNING_RATE, WARM_UP = 4, 64, 1e-4, 2
CPU = torch.device("cpu")
TOOLS = ("tunefork", "peft", "peft_bf16_adapters")


def adapters() -> list[BankAdapter]:
    """The eight."""
    return [BankAdapter(LoraSection(rank=rank), seed) for seed, rank in enumerate(RANKS)]


def batches(adapter: int, steps: int) -> torch.Tensor:
    """(steps, BATCH, LENGTH) token ids of one adapter, the same for every tool."""
    generator = torch.Generator().manual_seed(adapter)
    return torch.randint(3, 40_000, (steps, BATCH, LENGTH), generator=generator)


def member(adapter: int, steps: int) -> Member:
    """One adapter's run."""
    rows = batches(adapter, steps).reshape(-1, LENGTH).int().numpy()
    supervised = torch.ones(LENGTH, dtype=torch.bool).numpy()
    known = adapters()[adapter]
    return Member(
        f"adapter-{adapter}",
        known.lora,
        known.seed,
        [Encoded(f"row {i}", row, supervised) for i, row in enumerate(rows)],
        [list(range(i * BATCH, (i + 1) * BATCH)) for i in range(steps)],
        [LEARNING_RATE] * steps,
    )


def run_tunefork(steps: int, folder: Path) -> dict[str, Any]:
    """All in one pass: seconds of each step, losses of each adapter."""
    bank = add_bank(load_model(MODEL, dtype=torch.bfloat16, device=CPU), adapters())
    settings = GroupSettings(micro_batch_tokens=len(RANKS) * BATCH * LENGTH)
    group = Group(bank, [member(at, steps) for at in range(len(RANKS))], settings)
    losses: dict[str, list[float]] = {f"adapter-{at}": [] for at in range(len(RANKS))}
    seconds = []
    reset_peak(CPU)
    while group.is_at_work:
        start = time.perf_counter()
        events = group.step()
        seconds.append(time.perf_counter() - start)
        for event in events:
            if isinstance(event, MemberStep):
                losses[event.name].append(event.record.loss)
    return {"seconds": [seconds], "losses": list(losses.values())}


def run_peft(steps: int, folder: Path, *, fp32_adapters: bool) -> dict[str, Any]:
    """One after the other by PEFT + transformers, in a plain loop with PyTorch's fused AdamW."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(find(MODEL).location, dtype=torch.bfloat16)
    losses: list[list[float]] = []
    seconds: list[list[float]] = []
    reset_peak(CPU)
    for at in range(len(RANKS)):
        model = PeftModel.from_pretrained(
            base,
            str(folder / str(at)),
            is_trainable=True,
            autocast_adapter_dtype=fp32_adapters,
        )
        if not fp32_adapters:
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.bfloat16()
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        losses.append([])
        seconds.append([])
        for batch in batches(at, steps):
            start = time.perf_counter()
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
            seconds[-1].append(time.perf_counter() - start)
        base = model.unload()
    return {"seconds": seconds, "losses": losses}


def child(tool: str, steps: int, folder: Path) -> None:
    """Run one tool and print its figures as a JSON line."""
    if tool == "tunefork":
        found = run_tunefork(steps, folder)
    else:
        found = run_peft(steps, folder, fp32_adapters=tool == "peft")
    print(json.dumps(found | {"peak": peak_bytes(CPU)}))


def rate(seconds: list[list[float]]) -> float:
    """Tokens/s of all adapters' steps, `seconds` by what ran in turn."""
    tokens = len(RANKS) * BATCH * LENGTH
    return tokens / sum(statistics.median(own) for own in seconds)


def main() -> None:
    """Run the tools in turn and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    timed: dict[str, list[list[float]]] = {tool: [] for tool in TOOLS}
    rates: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    peaks: dict[str, int] = dict.fromkeys(TOOLS, 0)
    losses: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = load_model(MODEL, dtype=torch.bfloat16, device=CPU)
        bank = add_bank(model, adapters())
        for at, adapter in enumerate(adapters()):
            own = bank.adapter(at)
            save_deltas(model, Path(scratch) / str(at), adapter.lora, own, base=MODEL.id)
        del bank, model
        for round_ in range(options.rounds):
            for tool in TOOLS:
                steps = max(20, options.steps) if round_ == 0 else options.steps
                command = [sys.executable, __file__, "--child", tool, str(steps), scratch]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                figures = json.loads(output.strip().splitlines()[-1])
                seconds = [own[WARM_UP:] for own in figures["seconds"]]
                timed[tool] = [
                    [*old, *new]
                    for old, new in zip(timed[tool] or [[] for _ in seconds], seconds, strict=True)
                ]
                rates[tool].append(rate(seconds))
                peaks[tool] = max(peaks[tool], figures["peak"])
                losses.setdefault(tool, [own[:20] for own in figures["losses"]])
                print(f"round {round_ + 1}  {tool:20s} {rates[tool][-1]:7.0f} tokens/s", flush=True)
    whole = {tool: rate(timed[tool]) for tool in TOOLS}
    ratios = {t: round(whole["tunefork"] / whole[t], 3) for t in TOOLS if t != "tunefork"}
    rows = [
        {
            "case": f"together_{len(RANKS)}x{BATCH}x{LENGTH}",
            "tool": "peft" if tool.startswith("peft") else tool,
            "setting": tool,
            "ours": tool == "tunefork",
            "tokens_per_s": round(whole[tool], 1),
            "spread": [round(min(rates[tool]), 1), round(max(rates[tool]), 1)],
            "peak_gib": round(peaks[tool] / 2**30, 2),
            "timed_steps": sum(map(len, timed[tool])),
            "ranks": RANKS,
            "first_losses": [[round(loss, 4) for loss in own] for own in losses[tool]],
        }
        | ({"ratios": ratios} if tool == "tunefork" else {})
        for tool in TOOLS
    ]
    device = describe(CPU)
    file = write("cpu_together", rows, device=f"{device['name']}, {device['threads']} threads")
    print(f"ratios {ratios}; {file}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
