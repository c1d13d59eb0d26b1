"""Before the first step: the run's worst moments once, so that a fault shows in the first minute.

The longest micro-batch of the *whole* run (by tokens, which most activations follow, and by row
length squared, which attention follows) goes forward and backward beside the optimiser's states and
the gradients of the micro-batches before it; then one evaluation batch, the largest; then a save
into the run folder's file system, with a look at the space that the run will take.

Nothing of it is left: random states are restored, gradients and optimiser states dropped, and the
update is one of a zero gradient at rate 0, which moves no weight (only -0.0 would become 0.0, so
those are put back). A run with it is bit-equal to one without.

It costs two micro-batches, one update, one batch of evaluation and one save: about what four
micro-batches take (5.5 s in the demo, whose runs have 53 of one second). A run of fewer than
`FEWEST` would show the same faults nearly as soon by itself, and is not rehearsed; of a longer one
it is at most a sixteenth.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.data.pack import MicroBatch, pack
from tunefork.errors import NoMemoryError
from tunefork.model.device import peak_bytes, reset_peak
from tunefork.train.dry_update import dry_update, zero_gradients
from tunefork.train.kernels import attention_kernels
from tunefork.train.longest import Passes, passes_of
from tunefork.train.out_of_memory import Remedies, phase
from tunefork.train.progress import duration
from tunefork.train.release import Release
from tunefork.train.runner import Runner
from tunefork.train.save_rehearsal import SaveCost, rehearse_save
from tunefork.train.state import Optimizer

FEWEST = 64
"""Micro-batches of a run that is worth a rehearsal."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What the rehearsal found."""

    micro_batch_tokens: int
    """What fits: the recipe's, or less where it may shrink."""
    seconds: float
    peak_bytes: int
    """Of the training passes, the optimiser's states included. The run's own may be higher, above
    all on a CPU."""
    train_s: float
    """Predicted for the whole run, from the longest micro-batches: rather too long."""
    evaluate_s: float | None = None
    """Predicted likewise."""
    save: SaveCost | None = None

    def __str__(self) -> str:
        said = [
            f"rehearsed in {self.seconds:.1f} s",
            f"peak at least {self.peak_bytes / 2**30:.2f} GiB",
        ]
        if self.save is not None:
            said.append(str(self.save))
        said.append(f"training will take about {duration(self.train_s)}")
        if self.evaluate_s is not None:
            said.append(f"evaluation {duration(self.evaluate_s)}")
        return ", ".join(said)


@dataclass(frozen=True, slots=True)
class Stage:
    """What a run does beside its steps, to be rehearsed too."""

    folder: Path
    evaluate: Callable[[], float]
    """Evaluates the largest batch; returns its share of all evaluation tokens."""
    save: Callable[[Path], object]
    """Saves the artefact into a folder."""
    kept: Callable[[int], int]
    """Bytes that the run will keep on disk, given those of the artefact."""


def rehearse(
    runner: Runner,
    examples: Sequence[Encoded],
    steps: Sequence[Sequence[int]],
    optimizer: Optimizer,
    *,
    micro_batch_tokens: int,
    packing: bool,
    pad_id: int,
    on_out_of_memory: Literal["error", "shrink"],
    stage: Stage | None = None,
    release: Release | None = None,
) -> Rehearsal | None:
    """Go through the run's worst moments; None for a run too short to need it.

    With `release`, which is entered, gradients are freed as they come.

    Raises NoMemoryError that names the phase, NoRoomError where the disk will not hold what the run
    keeps, and whatever an evaluation or a save would have raised.
    """
    start = time.perf_counter()
    model, remedies = runner.model, runner.remedies
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    longest = max((len(examples[at].input_ids) for step in steps for at in step), default=0)
    limit = max(micro_batch_tokens, longest)
    with torch.random.fork_rng(devices=devices), attention_kernels():
        while True:
            passes = passes_of(examples, steps, micro_batch_tokens=limit, packing=packing)
            if passes.count < FEWEST:
                return None
            try:
                made = [
                    pack(
                        [examples[i] for i in steps[step]],
                        max_tokens=limit,
                        packing=packing,
                        pad_id=pad_id,
                    )[at]
                    for step, at in passes.heaviest
                ]
                peak, train_s = _train(runner, optimizer, passes, made, len(steps), release)
                break
            except NoMemoryError:
                if on_out_of_memory == "error" or limit <= longest:
                    raise
            limit = max(longest, limit // 2)
        found = Rehearsal(limit, 0.0, peak, train_s)
        found = found if stage is None else _off_stage(found, model, stage, remedies)
    reset_peak(device)
    return replace(found, seconds=time.perf_counter() - start)


def _train(
    runner: Runner,
    optimizer: Optimizer,
    passes: Passes,
    batches: Sequence[MicroBatch],
    num_steps: int,
    release: Release | None,
) -> tuple[int, float]:
    """Peak bytes, and predicted seconds of all steps."""
    model = runner.model
    device = next(model.parameters()).device
    was_training = model.training
    model.train()
    reset_peak(device)
    try:
        with dry_update(optimizer, runner.remedies, release) as update_s:
            if passes.is_accumulated:  # the second micro-batch finds the first one's gradients
                zero_gradients(optimizer)
            token_s = []
            for batch in batches:
                laid = runner.lay_out(batch)
                rows, width = batch.input_ids.shape
                where = f"rehearsal of the longest micro-batch, {rows} x {width} tokens"
                if runner.pads:  # the first pass of a size is for compiling
                    runner.loss(laid, 1, where)
                started = _now(device)
                runner.loss(laid, 1, where)
                token_s.append((_now(device) - started) / (rows * width))
            return peak_bytes(device), min(token_s) * passes.tokens + update_s * num_steps
    finally:
        for parameter in optimizer.parameters:
            parameter.grad = None
        model.train(was_training)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _off_stage(
    found: Rehearsal, model: PreTrainedModel, stage: Stage, remedies: Remedies | None
) -> Rehearsal:
    """The evaluation and the save."""
    device = next(model.parameters()).device
    start = _now(device)
    with phase("evaluation", remedies, "rehearsal of the largest batch"):
        share = stage.evaluate()
    evaluate_s = (_now(device) - start) / max(share, 1e-9)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    with phase("save", remedies, "rehearsal"):
        save = rehearse_save(stage.folder, stage.save, trained_bytes=trained, kept=stage.kept)
    return replace(found, evaluate_s=evaluate_s, save=save)
