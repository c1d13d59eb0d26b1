"""The training loop: one for LoRA, QLoRA and full fine-tuning; only the build before it differs.

An optimiser step takes the same examples whatever the memory: they are packed into micro-batches,
each micro-batch's *summed* loss is divided by the supervised tokens of the whole step, and the
gradients add up. Accumulation and packing therefore change speed and memory, never the gradient.

A run goes on from its newest checkpoint, bit for bit: what the next step depends on is in
`state.py`, the rest follows from the arguments.

`train` is the loop; `accumulate.py` has the forward and backward passes of one optimiser step,
`guard.py` and `recovery.py` what comes between a sick step and the weights.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.model.device import peak_bytes, process_bytes, reset_peak
from tunefork.model.head import find_head
from tunefork.train.accumulate import Accumulator, random_states
from tunefork.train.checkpoints import Checkpoints, Found
from tunefork.train.clip import clip_factor
from tunefork.train.guard import SpikeWatch, lost_by_adapter, lost_gradient
from tunefork.train.interrupt import Interrupt
from tunefork.train.kernels import attention_kernels
from tunefork.train.out_of_memory import phase
from tunefork.train.recovery import JUST_STOP, OnFault, Recovery
from tunefork.train.release import Release, check_one_pass
from tunefork.train.runner import Runner
from tunefork.train.state import Optimizer, Progress, restore
from tunefork.train.unreached import is_due, tell_unreached
from tunefork.train.validation import Validation, go_back_to_best


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
    is_asked_to_stop: bool
    """By a signal or the preemption file, if only during the last step."""
    num_steps: int
    """All that are finished, those before a checkpoint included; so below."""
    kept_step: int
    """After which the weights were as they are left."""
    validation_loss: float | None
    """The lowest that was measured."""
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
    max_grad_norm: float | None,
    seed: int,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    checkpoints: Checkpoints | None = None,
    start: Found | None = None,
    preemption_file: Path | None = None,
    stop_after: int | None = None,
    on_fault: OnFault = JUST_STOP,
    validation: Validation | None = None,
    runner: Runner | None = None,
    release: Release | None = None,
) -> TrainResult:
    """Run the optimiser steps (indices into `examples`), each at its own learning rate.

    Goes on from `start`, one of `checkpoints`. Ctrl-C, SIGTERM, SIGUSR1 or `preemption_file` ends
    the run after the step at hand, its state saved, with status "interrupted"; `stop_after` so many
    steps does likewise. With `validation` that keeps the best state, a run that came to its end
    leaves the weights of that state; it needs `checkpoints`. `runner` runs the model's passes where
    they are not to be launched kernel by kernel; `release`, entered, updates in the backward pass,
    and nothing is clipped. Raises DivergedError, before the update, when a loss or gradient is not
    finite (with `release` after it where it is the gradient), NoGradientError where a loss leaves
    none (likewise); NoMemoryError; RecipeError for a step that `release` cannot take; and
    CheckpointError where one cannot be read or written.
    """
    device = next(model.parameters()).device
    model.train()
    torch.manual_seed(seed)
    done = Progress() if start is None else restore(start.read(), model, optimizer)
    reset_peak(device)
    runner = runner or Runner(model, find_head(model), remedies=on_fault.remedies)
    head = runner.head
    cut = Accumulator(
        runner,
        min(done.micro_batch_tokens or micro_batch_tokens, micro_batch_tokens),
        packing,
        pad_id,
        on_fault.out_of_memory,
        on_fault.on_event,
    )
    if release is not None:
        left = steps[done.step :]
        check_one_pass(examples, left, micro_batch_tokens=cut.limit, packing=packing)
    recovery = Recovery(cut, optimizer, checkpoints, on_fault, releases=release is not None)
    watch = SpikeWatch(done.losses)
    records: list[StepRecord] = []
    clock = time.perf_counter() - done.seconds
    with (
        Interrupt(preemption_file) as interrupt,
        attention_kernels(),
        checkpoints or nullcontext(),
    ):
        while done.step < len(steps):
            number = done.step + 1
            if number in done.skipped:
                done = replace(done, step=number)
                continue
            chosen = [examples[i] for i in steps[number - 1]]
            learning_rate = learning_rates[number - 1]
            random = random_states(device)
            following = [examples[i] for i in steps[number]] if number < len(steps) else []
            if release is None:
                total, num_supervised = cut.gradient(chosen, number, following)
                # First the norm, which is launched behind the loss: one wait for both.
                grad_norm, loss = optimizer.gradient_norm(), float(total)
            else:  # what may keep the step from its update is looked at before the first one
                (loss, num_supervised), grad_norm = cut.forward(chosen, number), 0.0
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                what = f"the loss is {loss}"
                what += "" if release is not None else f" and the gradient's norm {grad_norm}"
                raise recovery.stop(what, done, random, chosen, find_rows=True)
            lost = None if release is not None else lost_gradient(loss, grad_norm)
            if release is None and not records:
                lost = lost or lost_by_adapter(model, loss)
            if lost is not None:
                raise recovery.stop(lost, done, random, chosen, find_rows=False, is_lost=True)
            if (spike := watch.found(loss)) is not None:
                back = recovery.spike(spike, done, random, chosen)
                if back is not None:
                    done, watch = back, SpikeWatch(back.losses)
                    records = [record for record in records if record.step <= done.step]
                    continue
            if release is None:
                with phase("optimiser step", on_fault.remedies, f"step {number}"):
                    optimizer.step(learning_rate, clip_factor(grad_norm, max_grad_norm))
            else:
                release.begin(learning_rate)
                cut.backward(following)
                grad_norm = release.end()
                if not math.isfinite(grad_norm):
                    what = f"the gradient's norm is {grad_norm} (the loss {loss:.4g})"
                    raise recovery.stop_after(what, done, chosen)
                if (lost := lost_gradient(loss, grad_norm)) is not None:
                    raise recovery.stop_after(lost, done, chosen, is_lost=True)
            done = Progress(
                number,
                done.tokens + sum(len(example.input_ids) for example in chosen),
                done.supervised_tokens + num_supervised,
                time.perf_counter() - clock,
                cut.limit,
                done.skipped,
                tuple(watch.losses),
                done.best_step,
                done.best_loss,
            )
            records.append(StepRecord(number, done.tokens, loss, learning_rate, grad_norm))
            on_step(records[-1])
            if is_due(number, len(steps)):
                tell_unreached(model, optimizer, number, on_fault.on_event)
            if validation is not None and validation.is_due(number, len(steps)):
                done = validation.measure(model, head, done)
            is_last = interrupt.requested or number == stop_after
            if checkpoints is not None:
                checkpoints.check()
                if is_last or (number < len(steps) and checkpoints.is_due(done)):
                    checkpoints.save(model, optimizer, done, wait=is_last)
            if is_last:
                break
    kept_step = done.step
    if validation is not None and validation.keep_best and done.step == len(steps):
        assert checkpoints is not None
        kept_step = go_back_to_best(model, checkpoints, done, validation.on_event)
    return TrainResult(
        status="ok" if done.step == len(steps) else "interrupted",
        steps=records,
        is_asked_to_stop=interrupt.requested,
        num_steps=done.step,
        kept_step=kept_step,
        validation_loss=done.best_loss if validation is not None else None,
        tokens=done.tokens,
        supervised_tokens=done.supervised_tokens,
        seconds=time.perf_counter() - clock,
        peak_memory_bytes=peak_bytes(device),
        process_bytes=process_bytes(device),
    )
