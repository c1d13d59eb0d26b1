"""The training loop: one for LoRA, QLoRA and full fine-tuning; only the build before it differs.

An optimiser step takes the same examples whatever the memory: they are packed into micro-batches,
each micro-batch's *summed* loss is divided by the supervised tokens of the whole step, and the
gradients add up. Accumulation and packing therefore change speed and memory, never the gradient.

A run goes on from its newest checkpoint, bit for bit: what the next step depends on is in
`state.py`, the rest follows from the arguments.

`train` is the loop, `_accumulate` the forward and backward passes of one optimiser step.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.data.pack import MicroBatch, pack
from tunefork.errors import DivergedError
from tunefork.model.device import peak_bytes, process_bytes, reset_peak
from tunefork.model.head import Head, find_head
from tunefork.train.checkpoints import Checkpoints, Found
from tunefork.train.interrupt import Interrupt
from tunefork.train.kernels import attention_kernels
from tunefork.train.loss import loss_sum
from tunefork.train.optim import clip_gradients
from tunefork.train.state import Optimizer, Progress, restore


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one optimiser step did."""

    step: int
    """From 1."""
    tokens: int
    """Tokens seen since the start of the run, padding not counted."""
    loss: float
    """Mean over the step's supervised tokens, nats, before the update."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm before clipping."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run did."""

    status: Literal["ok", "interrupted"]
    steps: list[StepRecord]
    """Those that this process took."""
    num_steps: int
    """All that are finished, those before a checkpoint included; so below."""
    tokens: int
    """Tokens seen, prompts included, padding not."""
    supervised_tokens: int
    seconds: float
    """From the first step's start to the last one's end, checkpoints included."""
    peak_memory_bytes: int
    """CUDA memory allocated, or resident set on a CPU, while training; the weights included."""
    process_bytes: int
    """Of the whole process: on a GPU with what PyTorch holds unused and the context."""


def train(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    steps: Sequence[Sequence[int]],
    optimizer: Optimizer,
    *,
    learning_rates: Sequence[float],
    micro_batch_tokens: int,
    packing: bool,
    pad_id: int,
    max_grad_norm: float,
    seed: int,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    checkpoints: Checkpoints | None = None,
    start: Found | None = None,
    preemption_file: Path | None = None,
    stop_after: int | None = None,
) -> TrainResult:
    """Run the optimiser steps (indices into `examples`), each at its own learning rate.

    Goes on from `start`, one of `checkpoints`. Ctrl-C, SIGTERM, SIGUSR1 or `preemption_file` ends
    the run after the step at hand, its state saved, with status "interrupted"; `stop_after` so many
    steps does likewise. Raises DivergedError, before the update, when a loss or gradient is not
    finite, and CheckpointError where one cannot be read or written.
    """
    device = next(model.parameters()).device
    head = find_head(model)
    model.train()
    torch.manual_seed(seed)
    done = Progress() if start is None else restore(start.read(), model, optimizer)
    reset_peak(device)
    records: list[StepRecord] = []
    clock = time.perf_counter() - done.seconds
    with (
        Interrupt(preemption_file) as interrupt,
        attention_kernels(),
        checkpoints or nullcontext(),
    ):
        for number in range(done.step + 1, len(steps) + 1):
            chosen = [examples[i] for i in steps[number - 1]]
            learning_rate = learning_rates[number - 1]
            batches = pack(chosen, max_tokens=micro_batch_tokens, packing=packing, pad_id=pad_id)
            num_supervised = sum(len(batch.supervised[0]) for batch in batches)
            loss = _accumulate(model, head, batches, num_supervised, device)
            grad_norm = clip_gradients(optimizer.parameters, max_grad_norm)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise DivergedError(
                    f"step {number}: the loss is {loss} and the gradient's norm {grad_norm}; the "
                    "weights were left as they were before the step. The step's rows: "
                    f"{', '.join(e.source for e in chosen[:16])}. Lower train.learning_rate, or "
                    "set train.precision: fp32"
                )
            optimizer.step(learning_rate)
            done = Progress(
                number,
                done.tokens + sum(len(example.input_ids) for example in chosen),
                done.supervised_tokens + num_supervised,
                time.perf_counter() - clock,
            )
            records.append(StepRecord(number, done.tokens, loss, learning_rate, grad_norm))
            on_step(records[-1])
            is_last = interrupt.requested or number == stop_after
            if checkpoints is not None:
                checkpoints.check()
                if is_last or (number < len(steps) and checkpoints.is_due(number)):
                    checkpoints.save(model, optimizer, done, wait=is_last)
            if is_last:
                break
    return TrainResult(
        status="ok" if done.step == len(steps) else "interrupted",
        steps=records,
        num_steps=done.step,
        tokens=done.tokens,
        supervised_tokens=done.supervised_tokens,
        seconds=time.perf_counter() - clock,
        peak_memory_bytes=peak_bytes(device),
        process_bytes=process_bytes(device),
    )


def _accumulate(
    model: PreTrainedModel,
    head: Head,
    batches: Sequence[MicroBatch],
    num_supervised: int,
    device: torch.device,
) -> float:
    """Add the step's gradient to the parameters; returns its mean loss, nats per token."""
    total = torch.zeros((), device=device)
    for batch in batches:
        loss = loss_sum(model, head, batch.to(device)) / num_supervised
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return float(total)
