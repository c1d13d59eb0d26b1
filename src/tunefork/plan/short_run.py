"""A short real training run with random weights and tokens: what predictions are fitted to.

It goes through the same build, engine, optimiser and loop as `tunefork train`; only the model's
weights and the data are made up, so no checkpoint is needed.
"""

import gc
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tunefork.data.example import Encoded
from tunefork.data.pack import pack
from tunefork.model import attention
from tunefork.model.build import build
from tunefork.model.device import context_bytes
from tunefork.model.fused import fuse
from tunefork.model.onednn import bound_shapes
from tunefork.plan.batches import shape_of
from tunefork.plan.built import Build
from tunefork.plan.passes import Shape
from tunefork.recipe import DataSection, ModelSection, Recipe, TrainSection
from tunefork.train.engine import prepare
from tunefork.train.loop import StepRecord, train
from tunefork.train.method import make_optimizer, make_release

WARM_UP = 3
"""Steps that are not timed: kernels are loaded and compiled in them."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a short run took."""

    tensor_bytes: int | None
    """Peak of CUDA memory allocated; None on a CPU, where only the process can be seen."""
    process_bytes: int
    """Peak: what PyTorch held plus the CUDA context, or the resident set on a CPU."""
    context_bytes: int | None
    step_s: float
    """Median over the timed steps."""
    step_s_spread: tuple[float, float]
    steps_s: tuple[float, ...]
    """Each of the timed steps, in order."""
    shapes: tuple[tuple[Shape, ...], ...]
    """Of each step's forward passes."""
    losses: tuple[float, ...]


def short_run(
    config: Any,
    made: Build,
    lengths: Sequence[Sequence[int]],
    *,
    micro_batch_tokens: int,
    packing: bool,
    device: torch.device,
) -> Measured:
    """Train on one step for each of `lengths` (tokens of its examples), every token supervised.

    Raises KeyboardInterrupt where it is asked to stop, as nothing is measured then.
    """
    bound_shapes()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    attention.register()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=made.dtype,
            attn_implementation=attention.NAME,
        )
    build(model, made.method, made.lora, seed=0)
    if made.form is not None:
        fuse(model, made.form.storage, made.form.products, device)
    examples, steps = examples_of(lengths, config.get_text_config().vocab_size)
    recipe = _recipe(made)
    optimizer = make_optimizer(model, recipe, made.method, seed=0)
    release = make_release(model, optimizer, recipe, made.method)
    runner = prepare(model, recipe, num_steps=len(steps), releases=release is not None)
    times = [time.perf_counter()]
    losses: list[float] = []

    def on_step(record: StepRecord) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
        losses.append(record.loss)

    with release or nullcontext():
        result = train(
            model,
            examples,
            steps,
            optimizer,
            learning_rates=[1e-5] * len(steps),
            micro_batch_tokens=micro_batch_tokens,
            packing=packing,
            pad_id=0,
            max_grad_norm=recipe.train.max_grad_norm,
            seed=0,
            on_step=on_step,
            runner=runner,
            release=release,
        )
    if result.is_asked_to_stop:
        raise KeyboardInterrupt
    steps_s = tuple(b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False))
    timed = sorted(steps_s)
    is_cuda = device.type == "cuda"
    return Measured(
        tensor_bytes=result.peak_memory_bytes if is_cuda else None,
        process_bytes=result.process_bytes,
        context_bytes=context_bytes(device) if is_cuda else None,
        step_s=timed[len(timed) // 2],
        step_s_spread=(timed[0], timed[-1]),
        steps_s=steps_s,
        shapes=shapes_of(examples, steps, micro_batch_tokens, packing),
        losses=tuple(losses),
    )


def shapes_of(
    examples: Sequence[Encoded], steps: Sequence[Sequence[int]], most_tokens: int, packing: bool
) -> tuple[tuple[Shape, ...], ...]:
    """Of each step's forward passes."""
    return tuple(
        tuple(
            shape_of(batch)
            for batch in pack(
                [examples[at] for at in step], max_tokens=most_tokens, packing=packing
            )
        )
        for step in steps
    )


def _recipe(made: Build) -> Recipe:
    return Recipe(
        model=ModelSection(id="-"),
        data=DataSection(train="-"),
        lora=made.lora,
        full=made.full,
        train=TrainSection(
            precision="int8" if made.wants_int8 else "auto",
            activation_checkpointing=made.checkpointing,
            compile="always" if made.is_compiled else "never",
            max_grad_norm=None if made.full.gradient_release else 1.0,
        ),
    )


def examples_of(
    lengths: Sequence[Sequence[int]], vocabulary: int
) -> tuple[list[Encoded], list[list[int]]]:
    """Random examples of these lengths, and which of them each step takes."""
    draw = np.random.default_rng(0)
    examples: list[Encoded] = []
    steps = []
    for step in lengths:
        steps.append(list(range(len(examples), len(examples) + len(step))))
        for length in step:
            ids = draw.integers(3, vocabulary, length).astype(np.int32)
            examples.append(Encoded("random", ids, np.ones(length, dtype=np.bool_)))
    return examples, steps
