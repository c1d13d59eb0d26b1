"""Stopped anywhere and gone on with, a run has the bits of one that was not stopped."""

import copy
import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tests.train.test_loss import examples
from tunefork.data.pack import pack
from tunefork.errors import CheckpointError
from tunefork.model.build import build
from tunefork.recipe import LoraSection, Method
from tunefork.train import runner
from tunefork.train.adamw_bf16 import Bf16AdamW
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.checkpoints import Checkpoints, Policy
from tunefork.train.loop import StepRecord, TrainResult, train
from tunefork.train.loss import loss_sum
from tunefork.train.optim import ShadowAdamW
from tunefork.train.state import Optimizer, Progress, State, capture, digest, restore

EXAMPLES = examples((9, 4, 17, 6, 12, 8, 5, 11))
STEPS = [[i % 8, (i + 3) % 8, (i + 5) % 8, (i + 6) % 8] for i in range(8)]
RATES = [1e-2 / (1 + i) for i in range(8)]

KINDS: dict[str, tuple[Method, dict[str, Any]]] = {
    "lora": (Method.LORA, {}),
    "qlora": (Method.QLORA, {}),
    "full_fp32": (Method.FULL, {"keep_shadows": True}),
    "full_bf16": (Method.FULL, {"keep_shadows": False}),
    "full_8bit": (Method.FULL, {"keep_shadows": True, "eight_bit": True}),
    "full_small": (Method.FULL, {}),
    "lora_dropout": (Method.LORA, {"dropout": 0.3, "packing": True}),
}


class Killed(Exception):
    """Stands for a kill: nothing of the process is left."""


def start(kind: str) -> tuple[Any, Optimizer]:
    """A built model and its optimiser, as at a run's beginning."""
    method, options = KINDS[kind]
    model = tiny_model("llama")
    if "8bit" in kind:  # only weights of 4,096 values or more have states in 8 bits
        config = copy.deepcopy(model.config)
        config.intermediate_size = 160
        torch.manual_seed(0)
        model = type(model)(config)
    if method is Method.FULL:
        model.to(torch.bfloat16)
    build(model, method, LoraSection(rank=4, dropout=options.get("dropout", 0.0)), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    if method is not Method.FULL:
        return model, LoraAdamW(trained, betas=(0.9, 0.999), weight_decay=0.0)
    if kind == "full_small":
        return model, Bf16AdamW(trained, betas=(0.9, 0.999), weight_decay=0.1)
    return model, ShadowAdamW(
        trained,
        keep_shadows=options["keep_shadows"],
        eight_bit=options.get("eight_bit", False),
        betas=(0.9, 0.999),
        weight_decay=0.1,
    )


def run(
    kind: str, checkpoints: Checkpoints | None = None, **options: Any
) -> tuple[State, TrainResult]:
    """Train from the newest checkpoint on, in a model of its own; returns the end."""
    model, optimizer = start(kind)
    found = checkpoints.newest() if checkpoints else None
    result = train(
        model,
        EXAMPLES,
        STEPS,
        optimizer,
        learning_rates=RATES,
        micro_batch_tokens=17,  # several micro-batches a step
        packing=KINDS[kind][1].get("packing", False),
        pad_id=0,
        max_grad_norm=1.0,
        seed=0,
        checkpoints=checkpoints,
        start=found,
        **options,
    )
    return capture(model, optimizer, Progress(step=result.num_steps)), result


@cache
def whole(kind: str) -> tuple[State, TrainResult]:
    """A run that is never stopped."""
    return run(kind)


def checkpoints(folder: Path, **options: Any) -> Checkpoints:
    """Of one run in `folder`, a checkpoint after each step unless told otherwise."""
    policy = Policy(**({"every_steps": 1} | options))
    return Checkpoints(folder / "checkpoints", {"seed": 0}, {"threads": 1}, policy)


def _kill_in_step(monkeypatch: pytest.MonkeyPatch, kind: str, step: int) -> None:
    """End the run in the second micro-batch of `step`."""
    passes, first = 0, loss_sum
    packing = KINDS[kind][1].get("packing", False)
    before = sum(len(_batches(number, packing)) for number in range(1, step))

    def until_killed(*arguments: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes == before + 2:
            raise Killed
        return first(*arguments)

    monkeypatch.setattr(runner, "loss_sum", until_killed)


def _batches(step: int, packing: bool) -> list[Any]:
    chosen = [EXAMPLES[i] for i in STEPS[step - 1]]
    return pack(chosen, max_tokens=17, packing=packing, pad_id=0)


def _some(kinds: Iterable[str], cuts: Sequence[int]) -> list[Any]:
    """Every kind at every cut, by default each at one of them in turn."""
    return [
        pytest.param(kind, cut, marks=() if number % len(cuts) == at else pytest.mark.slow)
        for number, kind in enumerate(kinds)
        for at, cut in enumerate(cuts)
    ]


@pytest.mark.parametrize(("kind", "cut"), _some(KINDS, [1, 2, 4, 7]))
def test_a_stop_between_steps_changes_no_bit(kind: str, cut: int, tmp_path: Path) -> None:
    def on_step(record: StepRecord) -> None:
        if record.step == cut:
            os.kill(os.getpid(), signal.SIGTERM)

    _, stopped = run(kind, checkpoints(tmp_path, every_steps=None), on_step=on_step)
    assert (stopped.status, stopped.num_steps) == ("interrupted", cut)
    end, result = run(kind, checkpoints(tmp_path))
    expected, uninterrupted = whole(kind)
    assert [r.step for r in result.steps] == list(range(cut + 1, len(STEPS) + 1))
    assert stopped.steps + result.steps == uninterrupted.steps
    assert (result.tokens, result.supervised_tokens) == (
        uninterrupted.tokens,
        uninterrupted.supervised_tokens,
    )
    assert digest(end.tensors) == digest(expected.tensors)


@pytest.mark.parametrize(
    ("kind", "cut"),
    _some(["lora", "qlora", "full_bf16", "full_small", "lora_dropout"], [2, 5]),
)
def test_a_kill_within_a_step_changes_no_bit(
    kind: str, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        _kill_in_step(patch, kind, cut)
        run(kind, checkpoints(tmp_path))
    end, result = run(kind, checkpoints(tmp_path))
    assert result.steps[0].step == cut
    assert digest(end.tensors) == digest(whole(kind)[0].tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_of_a_state_matters(kind: str) -> None:
    """A state that misses a step's effect anywhere would pass the tests above by chance only."""
    model, optimizer = start(kind)
    torch.manual_seed(0)
    first = capture(model, optimizer, Progress())
    last = whole(kind)[0]
    changed = {
        name for name in first.tensors if not torch.equal(first.tensors[name], last.tensors[name])
    }
    new = last.tensors.keys() - first.tensors.keys()
    assert {name for name in first.tensors if name.startswith("weights/")} <= changed
    assert any(name.startswith("optimizer/") for name in new)
    assert ("random/cpu" in changed) == ("dropout" in kind)
    assert any("qmap" in name for name in new) == ("8bit" in kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(kind: str) -> None:
    good = whole(kind)[0]  # first: a run draws from the generator that a state holds
    model, optimizer = start(kind)
    before = digest(capture(model, optimizer, Progress()).tensors)
    for name, value in good.tensors.items():
        if name.endswith(("0.step", ".0.shadow", "cpu")) or "layers.1.mlp.up_proj" in name:
            for wrong in (value.reshape(-1)[:-1], value.to(torch.float64), None):
                tensors = {k: v for k, v in good.tensors.items() if k != name}
                if wrong is not None:
                    tensors[name] = wrong
                with pytest.raises(CheckpointError):
                    restore(replace(good, tensors=tensors), model, optimizer)
    with pytest.raises(CheckpointError, match="has unknown, which this run has not"):
        extra = good.tensors | {"weights/unknown": torch.zeros(1)}
        restore(replace(good, tensors=extra), model, optimizer)
    with pytest.raises(CheckpointError, match="optimizer: has 999"):
        extra = good.tensors | {"optimizer/999.step": torch.zeros(())}
        restore(replace(good, tensors=extra), model, optimizer)
    assert digest(capture(model, optimizer, Progress()).tensors) == before
