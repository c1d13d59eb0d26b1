"""The training loop: one for LoRA, QLoRA and full fine-tuning; only the build before it differs.

An optimiser step takes the same examples whatever the memory: they are packed into micro-batches,
each micro-batch's *summed* loss is divided by the supervised tokens of the whole step, and the
gradients add up. Accumulation and packing therefore change speed and memory, never the gradient.

`train` is the loop, `_accumulate` the forward and backward passes of one optimiser step.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.data.pack import MicroBatch, pack
from tunefork.errors import DivergedError
from tunefork.model.device import peak_bytes, process_bytes, reset_peak
from tunefork.model.head import Head, find_head
from tunefork.train.interrupt import Interrupt
from tunefork.train.kernels import attention_kernels
from tunefork.train.loss import loss_sum
from tunefork.train.optim import clip_gradients


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
    tokens: int
    """Tokens seen, prompts included, padding not."""
    supervised_tokens: int
    seconds: float
    """From the first step's start to the last one's end."""
    peak_memory_bytes: int
    """CUDA memory allocated, or resident set on a CPU, while training; the weights included."""
    process_bytes: int
    """Of the whole process: on a GPU with what PyTorch holds unused and the context."""


class Optimizer(Protocol):
    """What the loop asks of an optimiser."""

    parameters: list[nn.Parameter]

    def step(self, learning_rate: float) -> None:
        """Update the parameters and free their gradients."""


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
) -> TrainResult:
    """Run the optimiser steps (indices into `examples`), each at its own learning rate.

    Raises DivergedError, before the update, when a loss or gradient is not finite. Ctrl-C or
    SIGTERM ends the run after the step at hand, with status "interrupted".
    """
    device = next(model.parameters()).device
    head = find_head(model)
    model.train()
    torch.manual_seed(seed)
    reset_peak(device)
    records: list[StepRecord] = []
    tokens = supervised = 0
    start = time.perf_counter()
    with Interrupt() as interrupt, attention_kernels():
        for number, (indices, learning_rate) in enumerate(
            zip(steps, learning_rates, strict=True), start=1
        ):
            chosen = [examples[i] for i in indices]
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
            tokens += sum(len(example.input_ids) for example in chosen)
            supervised += num_supervised
            records.append(StepRecord(number, tokens, loss, learning_rate, grad_norm))
            on_step(records[-1])
            if interrupt.requested:
                break
    return TrainResult(
        status="ok" if len(records) == len(steps) else "interrupted",
        steps=records,
        tokens=tokens,
        supervised_tokens=supervised,
        seconds=time.perf_counter() - start,
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
