"""LoRA training on a CPU: tokens/s of tunefork beside PEFT + transformers.

SmolLM2-135M, batch of 8 x 128 tokens, every token supervised, rank 16 on all linear layers, bf16,
the same threads. A figure is the median over all timed steps (`cpu_turns.py`). Both start from the
same adapter file and see the same batches, so their first 20 losses must agree: a fast wrong kernel
would show there.

`peak_gib` is the most memory that the process held from the first step on, the weights, Python and
libraries included; what only loading took is left out for every tool.

    python -m benchmarks.cpu_training [--rounds 3] [--steps 12]
"""

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_turns import CPU, LEARNING_RATE, MODEL, Figures, compare, peft_base, train_peft
from tunefork.data.example import Encoded
from tunefork.model.build import add_deltas
from tunefork.model.device import reset_peak
from tunefork.model.load import load_model
from tunefork.recipe import LoraSection
from tunefork.registry.peft_format import save_adapter
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.loop import train

LORA = LoraSection(rank=16)
BATCH, LENGTH = 8, 128


def batches(steps: int) -> torch.Tensor:
    """(steps, BATCH, LENGTH) token ids, the same for every tool."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 40_000, (steps, BATCH, LENGTH), generator=generator)


def run_tunefork(ids: torch.Tensor) -> Figures:
    """By the training loop, which measures memory from its first step on."""
    model = load_model(MODEL, dtype=torch.bfloat16, device=CPU)
    add_deltas(model, LORA, seed=0)
    rows = ids.reshape(-1, LENGTH).int().numpy()
    supervised = torch.ones(LENGTH, dtype=torch.bool).numpy()
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
        [Encoded(f"row {i}", row, supervised) for i, row in enumerate(rows)],
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
    return Figures([losses], [seconds])


def run(tool: str, steps: int, folder: Path) -> Figures:
    """One tool's steps."""
    if tool == "tunefork":
        return run_tunefork(batches(steps))
    figures = Figures()
    base = peft_base()
    reset_peak(CPU)
    train_peft(base, folder, batches(steps), tool, figures)
    return figures


def prepare(folder: Path) -> None:
    """The adapter that both start from."""
    start = load_model(MODEL, dtype=torch.bfloat16, device=CPU)
    add_deltas(start, LORA, seed=0)
    save_adapter(start, folder, LORA, base=MODEL.id)


if __name__ == "__main__":
    case = f"lora_bf16_{BATCH}x{LENGTH}"
    compare("cpu_training", case, tokens=BATCH * LENGTH, prepare=prepare, run=run, rounds=3)
