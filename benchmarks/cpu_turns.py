"""Training on a CPU by tunefork and by PEFT in turn: what cpu_training and cpu_together share.

Each tool runs in a process of its own (`--child TOOL STEPS FOLDER`), the tools take turns,
`--rounds` times over. PEFT runs twice: with its default fp32 adapters, which it multiplies in fp32,
and with adapters in bf16, its faster setting.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import write
from tunefork.model.device import describe, peak_bytes
from tunefork.model.load import find
from tunefork.recipe import ModelSection

MODEL = ModelSection(id="smollm2-135m-instruct")
CPU = torch.device("cpu")
LEARNING_RATE, WARM_UP, NUM_FIRST = 1e-4, 2, 20
TOOLS = ("tunefork", "peft", "peft_bf16_adapters")


@dataclass(slots=True)
class Figures:
    """What one tool did: a list an adapter, and in it a value a step (tunefork's steps of many
    adapters have one list of seconds for all)."""

    losses: list[list[float]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    peak: int = 0
    """Bytes."""


@dataclass(slots=True)
class Turns:
    """A tool's figures over all rounds, warm-up left out."""

    first_losses: list[list[float]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    """Tokens/s of each round."""
    peak: int = 0

    def add(self, figures: Figures, tokens: int) -> None:
        """One round's."""
        timed = [own[WARM_UP:] for own in figures.seconds]
        self.seconds = [
            a + b for a, b in zip(self.seconds or [[] for _ in timed], timed, strict=True)
        ]
        self.rates.append(rate(timed, tokens))
        self.peak = max(self.peak, figures.peak)
        self.first_losses = self.first_losses or [own[:NUM_FIRST] for own in figures.losses]


def rate(seconds: list[list[float]], tokens: int) -> float:
    """Tokens/s where a step of each list, one after the other, is `tokens` in all."""
    return tokens / sum(statistics.median(own) for own in seconds)


def peft_base() -> Any:
    """The base as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(find(MODEL).location, dtype=torch.bfloat16)


def train_peft(
    base: Any, adapter: Path, batches: Iterable[torch.Tensor], tool: str, figures: Figures
) -> Any:
    """PEFT + transformers in a plain loop with PyTorch's fused AdamW; returns PEFT's model."""
    from peft import PeftModel

    is_fp32 = tool == "peft"
    model = PeftModel.from_pretrained(
        base, str(adapter), is_trainable=True, autocast_adapter_dtype=is_fp32
    )
    if not is_fp32:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    losses: list[float] = []
    seconds: list[float] = []
    for batch in batches:
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    figures.losses.append(losses)
    figures.seconds.append(seconds)
    return model


def compare(
    name: str,
    case: str,
    *,
    tokens: int,
    prepare: Callable[[Path], None],
    run: Callable[[str, int, Path], Figures],
    rounds: int,
    more: dict[str, Any] | None = None,
) -> None:
    """The whole of a script: `prepare` fills a folder, `run` is one tool's part, in its process.

    `tokens` are those of a step of all adapters; `more` goes into every row.
    """
    if sys.argv[1:2] == ["--child"]:
        figures = run(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        figures.peak = peak_bytes(CPU)
        print(json.dumps([figures.losses, figures.seconds, figures.peak]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    turns = {tool: Turns() for tool in TOOLS}
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        for round_ in range(options.rounds):
            for tool in TOOLS:
                steps = max(NUM_FIRST, options.steps) if round_ == 0 else options.steps
                command = [
                    sys.executable,
                    "-m",
                    f"benchmarks.{name}",
                    "--child",
                    tool,
                    str(steps),
                    scratch,
                ]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                turns[tool].add(Figures(*json.loads(output.strip().splitlines()[-1])), tokens)
                shown = turns[tool].rates[-1]
                print(f"round {round_ + 1}  {tool:20s} {shown:7.0f} tokens/s", flush=True)
    rows = [_row(tool, turns, tokens, case) | (more or {}) for tool in TOOLS]
    device = describe(CPU)
    file = write(
        name,
        rows,
        device=f"{device['name']}, {device['threads']} threads",
        command=" ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
    )
    print(f"ratios {rows[0]['ratios']}; {file}")


def _row(tool: str, turns: dict[str, Turns], tokens: int, case: str) -> dict[str, Any]:
    whole = {name: rate(one.seconds, tokens) for name, one in turns.items()}
    own = turns[tool]
    row = {
        "case": case,
        "tool": "peft" if tool.startswith("peft") else tool,
        "setting": tool,
        "ours": tool == "tunefork",
        "tokens_per_s": round(whole[tool], 1),
        "spread": [round(min(own.rates), 1), round(max(own.rates), 1)],
        "peak_gib": round(own.peak / 2**30, 2),
        "timed_steps": sum(map(len, own.seconds)),
        "first_losses": [[round(loss, 4) for loss in losses] for losses in own.first_losses],
    }
    if tool == "tunefork":
        row["ratios"] = {t: round(whole[tool] / whole[t], 3) for t in TOOLS if t != tool}
    return row
