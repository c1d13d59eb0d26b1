"""LoRA training on a CPU: tokens/s of tunefork beside PEFT + transformers.

SmolLM2-135M, batch of 8 x 128 tokens, every token supervised, rank 16 on all linear layers, bf16,
the same threads. Each tool runs in a process of its own, the tools take turns, `--rounds` times
over; a figure is the median over all timed steps. Both start from the same adapter file and see the
same batches, so their first 20 losses must agree: a fast wrong kernel would show there.

`peak_gib` is the most memory that the process held from the first step on, the weights, Python and
libraries included; what only loading took is left out for every tool.

PEFT runs twice: with its default fp32 adapters, which it multiplies in fp32, and with adapters in
bf16, its faster setting.

    python benchmarks/cpu_training.py [--rounds 3] [--steps 12]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.results import write
from tunefork.data.example import Encoded
from tunefork.model.build import add_deltas
from tunefork.model.device import describe, peak_bytes, reset_peak
from tunefork.model.load import find, load_model
from tunefork.recipe import LoraSection, ModelSection
from tunefork.registry.peft_format import save_adapter
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.loop import train

MODEL = ModelSection(id="smollm2-135m-instruct")
LORA = LoraSection(rank=16)
BATCH, LENGTH, LEARNING_RATE, WARM_UP = 8, 128, 1e-4, 2
CPU = torch.device("cpu")
TOOLS = ("tunefork", "peft", "peft_bf16_adapters")


def batches(steps: int) -> torch.Tensor:
    """(steps, BATCH, LENGTH) token ids, the same for every tool."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 40_000, (steps, BATCH, LENGTH), generator=generator)


def run_tunefork(ids: torch.Tensor, adapter: Path) -> tuple[list[float], list[float]]:
    """Losses and seconds of each step."""
    model = load_model(MODEL, dtype=torch.bfloat16, device=CPU)
    add_deltas(model, LORA, seed=0)
    rows = ids.reshape(-1, LENGTH).int().numpy()
    supervised = torch.ones(LENGTH, dtype=torch.bool).numpy()
    examples = [Encoded(f"row {i}", row, supervised) for i, row in enumerate(rows)]
    losses: list[float] = []
    seconds: list[float] = []
    last = time.perf_counter()

    def on_step(record: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        losses.append(record.loss)
        seconds.append(now - last)
        last = now

    train(
        model,
        examples,
        [list(range(i * BATCH, (i + 1) * BATCH)) for i in range(len(ids))],
        LoraAdamW(
            [p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.999), weight_decay=0.0
        ),
        learning_rates=[LEARNING_RATE] * len(ids),
        micro_batch_tokens=BATCH * LENGTH,
        packing=True,
        pad_id=0,
        max_grad_norm=1.0,
        seed=0,
        on_step=on_step,
    )
    return losses, seconds


def run_peft(
    ids: torch.Tensor, adapter: Path, *, fp32_adapters: bool
) -> tuple[list[float], list[float]]:
    """The same by PEFT + transformers, in a plain loop with PyTorch's fused AdamW."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(find(MODEL).location, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(
        base, str(adapter), is_trainable=True, autocast_adapter_dtype=fp32_adapters
    )
    if not fp32_adapters:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    losses, seconds = [], []
    reset_peak(CPU)  # where tunefork's `train` does: what loading took is no part of training
    for batch in ids:
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, seconds


RUN: dict[str, Callable[[torch.Tensor, Path], tuple[list[float], list[float]]]] = {
    "tunefork": run_tunefork,
    "peft": lambda ids, adapter: run_peft(ids, adapter, fp32_adapters=True),
    "peft_bf16_adapters": lambda ids, adapter: run_peft(ids, adapter, fp32_adapters=False),
}


def child(tool: str, steps: int, adapter: Path) -> None:
    """Run one tool and print its figures as a JSON line."""
    losses, seconds = RUN[tool](batches(steps), adapter)
    print(json.dumps({"losses": losses, "seconds": seconds, "peak": peak_bytes(CPU)}))


def main() -> None:
    """Run the tools in turn and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    timed: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    peaks: dict[str, int] = dict.fromkeys(TOOLS, 0)
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        start = load_model(MODEL, dtype=torch.bfloat16, device=CPU)
        add_deltas(start, LORA, seed=0)
        save_adapter(start, Path(scratch), LORA, base=MODEL.id)
        del start
        for round_ in range(options.rounds):
            for tool in TOOLS:
                steps = max(20, options.steps) if round_ == 0 else options.steps
                command = [sys.executable, __file__, "--child", tool, str(steps), scratch]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                figures = json.loads(output.strip().splitlines()[-1])
                timed[tool] += figures["seconds"][WARM_UP:]
                peaks[tool] = max(peaks[tool], figures["peak"])
                losses.setdefault(tool, figures["losses"][:20])
                rate = BATCH * LENGTH / statistics.median(figures["seconds"][WARM_UP:])
                print(f"round {round_ + 1}  {tool:20s} {rate:7.0f} tokens/s", flush=True)
    rates = {t: BATCH * LENGTH / statistics.median(s) for t, s in timed.items()}
    ratios = {t: round(rates["tunefork"] / rates[t], 3) for t in TOOLS if t != "tunefork"}
    rows = []
    for tool in TOOLS:
        per_step = sorted(BATCH * LENGTH / s for s in timed[tool])
        rows.append(
            {
                "case": f"lora_bf16_{BATCH}x{LENGTH}",
                "tool": "peft" if tool.startswith("peft") else tool,
                "setting": tool,
                "ours": tool == "tunefork",
                "tokens_per_s": round(rates[tool], 1),
                "spread": [round(per_step[len(per_step) // 10], 1), round(per_step[-1], 1)],
                "peak_gib": round(peaks[tool] / 2**30, 2),
                "timed_steps": len(per_step),
                "first_losses": [round(loss, 4) for loss in losses[tool]],
            }
            | ({"ratios": ratios} if tool == "tunefork" else {})
        )
    device = describe(CPU)
    file = write("cpu_training", rows, device=f"{device['name']}, {device['threads']} threads")
    print(f"ratios {ratios}; {file}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
