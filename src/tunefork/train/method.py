"""What a method trains: the built model and the optimiser that fits it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.data.isolation import check_packing
from tunefork.data.loader import steps
from tunefork.model.build import build
from tunefork.model.fused import fuse
from tunefork.model.load import load_model, new_ids
from tunefork.recipe import Method, Recipe
from tunefork.train import deterministic
from tunefork.train.adamw_bf16 import Bf16AdamW
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.checkpoints import Checkpoints, Found, Policy
from tunefork.train.engine import base_form, prepare
from tunefork.train.events import Event, SettingChanged
from tunefork.train.guard import check_weights
from tunefork.train.loop import StepRecord, TrainResult, train
from tunefork.train.optim import ShadowAdamW, learning_rate_at
from tunefork.train.out_of_memory import Remedies
from tunefork.train.recovery import OnFault
from tunefork.train.rehearsal import Rehearsal, Stage, rehearse
from tunefork.train.release import Release, check_shared
from tunefork.train.setting import environment, setting
from tunefork.train.state import Optimizer
from tunefork.train.validation import Validation

_CALIBRATION_ROWS, _CALIBRATION_LENGTH = 8, 256
"""Of the pass whose inputs an int8 base is made for."""


def load_for_training(
    recipe: Recipe,
    method: Method,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    examples: Sequence[Encoded] = (),
) -> PreTrainedModel:
    """The recipe's base, built for `method`. Raises ModelError where it cannot be.

    int8 products are made for inputs such as the first of `examples` (`model.fused`).
    """

    def put(model: PreTrainedModel, at: torch.device) -> None:
        added = new_ids(recipe.model)
        build(model, method, recipe.lora, seed=seed, device=at, new_ids=added)

    return load_and_fuse(recipe, method, put, dtype=dtype, device=device, examples=examples)


def load_and_fuse(
    recipe: Recipe,
    method: Method,
    put: Callable[[PreTrainedModel, torch.device], None],
    *,
    dtype: torch.dtype,
    device: torch.device,
    examples: Sequence[Encoded],
) -> PreTrainedModel:
    """The recipe's base on `device`, in its form, with what `put` puts on it.

    `put` is given the model and the device that it must be on then.
    """
    deterministic.prepare(recipe.train.deterministic)
    form = base_form(recipe, method, device=device, dtype=dtype)  # a refusal waits for no load
    model = load_model(recipe.model, dtype=dtype, device=device, in_host_memory=True)
    # An int8 base is quantised group by group on its way from the host to the device.
    at = torch.device("cpu") if form is not None and form.storage != "nf4" else device
    put(model, at)
    if form is not None:
        fuse(model, form.storage, form.products, device, calibration_ids(examples))
    if recipe.train.packing:
        check_packing(model)
    return model


def calibration_ids(examples: Sequence[Encoded]) -> torch.Tensor | None:
    """(rows, length): the ids of `examples`, one after the other, or None where there are none."""
    found, count = list[np.ndarray](), 0
    for example in examples:
        found.append(example.input_ids)
        count += len(example.input_ids)
        if count >= _CALIBRATION_ROWS * _CALIBRATION_LENGTH:
            break
    if not count:
        return None
    length = min(count, _CALIBRATION_LENGTH)
    rows = min(count // length, _CALIBRATION_ROWS)
    ids = np.concatenate(found)[: rows * length].astype(np.int64)
    return torch.from_numpy(ids).view(rows, length)


def make_optimizer(
    model: PreTrainedModel, recipe: Recipe, method: Method, *, seed: int
) -> Optimizer:
    """The optimiser of what `method` trains in `model`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    betas, decay = (recipe.train.beta1, recipe.train.beta2), recipe.train.weight_decay
    is_full, is_fp32 = method is Method.FULL, all(p.dtype == torch.float32 for p in trained)
    # Modules trained whole beside deltas may be bf16, and DoRA's magnitudes take no decay.
    if not is_full and is_fp32 and (decay == 0.0 or all(p.dim() >= 2 for p in trained)):
        return LoraAdamW(trained, betas=betas, weight_decay=decay)
    if is_full and recipe.full.optimizer == "adamw_bf16":
        return Bf16AdamW(trained, betas=betas, weight_decay=decay, seed=seed)
    return ShadowAdamW(
        trained,
        keep_shadows=not is_fp32 and not (is_full and recipe.full.weights == "bf16"),
        eight_bit=is_full and recipe.full.optimizer == "adamw_8bit",
        betas=betas,
        weight_decay=decay,
        seed=seed,
    )


def make_release(
    model: PreTrainedModel, optimizer: Optimizer, recipe: Recipe, method: Method
) -> Release | None:
    """What updates in the backward pass, where `method` and the recipe say so."""
    if method is not Method.FULL or not recipe.full.gradient_release:
        return None
    assert isinstance(optimizer, Bf16AdamW | ShadowAdamW)
    check_shared(model, recipe.train.checkpointing)
    return Release(optimizer)


def plan_steps(recipe: Recipe, num_examples: int, *, seed: int) -> list[list[int]]:
    """Indices of each optimiser step's examples: the same for every method of one seed."""
    return steps(
        num_examples,
        batch_size=recipe.train.batch_size,
        epochs=recipe.train.epochs,
        max_steps=recipe.train.max_steps,
        seed=seed,
    )


def open_checkpoints(
    folder: Path,
    examples: Sequence[Encoded],
    recipe: Recipe,
    method: Method,
    *,
    base_sha256: str,
    learning_rate: float,
    seed: int,
    device: torch.device,
    say: Callable[[str], None],
) -> Checkpoints:
    """The checkpoints in `folder` of the run that `train_method` takes with the same arguments.

    `base_sha256` is the base's (`model.identity.Identity.of_model`).
    """
    return Checkpoints(
        folder,
        setting(
            recipe,
            method,
            examples,
            base_sha256=base_sha256,
            learning_rate=learning_rate,
            seed=seed,
            num_steps=len(plan_steps(recipe, len(examples), seed=seed)),
        ),
        environment(device),
        Policy(
            every_s=recipe.train.checkpoint_every_s,
            every_steps=recipe.train.checkpoint_every_steps,
            keep=recipe.train.keep_checkpoints,
            keep_best=recipe.train.keep == "best",
        ),
        say,
    )


def train_method(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    recipe: Recipe,
    method: Method,
    *,
    learning_rate: float,
    seed: int,
    pad_id: int,
    on_step: Callable[[StepRecord], None],
    checkpoints: Checkpoints | None = None,
    start: Found | None = None,
    stop_after: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    stage: Stage | None = None,
    on_rehearsed: Callable[[Rehearsal | None], None] = lambda found: None,
    validate_on: Sequence[Encoded] = (),
) -> TrainResult:
    """Train the built `model` on `examples` as the recipe says, at a peak `learning_rate`.

    `checkpoints`, `start` and `stop_after` are those of `loop.train`. With a `stage`, the run is
    rehearsed before its first step, if the recipe says so. `validate_on` are the examples held
    back, where it asks for validation.
    """
    schedule = plan_steps(recipe, len(examples), seed=seed)
    section = recipe.train
    optimizer = make_optimizer(model, recipe, method, seed=seed)
    limit = section.micro_batch_tokens
    remedies = Remedies.of(recipe, method, model.device)
    check_weights(model, recipe.model.id)
    release = make_release(model, optimizer, recipe, method)
    runner = prepare(
        model,
        recipe,
        num_steps=len(schedule),
        remedies=remedies,
        releases=release is not None,
    )
    with deterministic.deterministic(section.deterministic), release or nullcontext():
        found = None
        if stage is not None and section.rehearse:
            found = rehearse(
                runner,
                examples,
                schedule if start is None else schedule[start.facts.step :],
                optimizer,
                micro_batch_tokens=(start and start.facts.micro_batch_tokens) or limit,
                packing=section.packing,
                pad_id=pad_id,
                on_out_of_memory=section.on_out_of_memory,
                stage=stage,
                release=release,
            )
        if found is not None and found.micro_batch_tokens < limit:
            on_event(
                SettingChanged(
                    step=0,
                    field="train.micro_batch_tokens",
                    before=limit,
                    after=found.micro_batch_tokens,
                    why="the rehearsal was out of memory; the gradients are the same",
                )
            )
            limit = found.micro_batch_tokens
        on_rehearsed(found)
        return train(
            model,
            examples,
            schedule,
            optimizer,
            learning_rates=[
                learning_rate_at(
                    step,
                    num_steps=len(schedule),
                    peak=learning_rate,
                    schedule=section.schedule,
                    warmup_share=section.warmup_share,
                )
                for step in range(len(schedule))
            ],
            micro_batch_tokens=limit,
            packing=section.packing,
            pad_id=pad_id,
            max_grad_norm=section.max_grad_norm,
            seed=seed,
            on_step=on_step,
            checkpoints=checkpoints,
            start=start,
            preemption_file=None
            if section.preemption_file is None
            else Path(section.preemption_file).expanduser(),
            stop_after=stop_after,
            on_fault=OnFault(section.on_out_of_memory, section.on_loss_spike, remedies, on_event),
            validation=Validation(
                validate_on,
                section.validate_every_steps,
                section.keep == "best",
                limit,
                section.packing,
                pad_id,
                on_event,
            )
            if validate_on and section.validate_every_steps
            else None,
            runner=runner,
            release=release,
        )
