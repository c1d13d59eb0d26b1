"""Trained tensors that no gradient reaches are named, whatever optimiser holds their moments."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny import tiny_model
from tests.train.test_loss import examples
from tunefork.model.build import build
from tunefork.recipe import LoraSection, Method
from tunefork.train.adamw_bf16 import Bf16AdamW
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.events import Event, Warned
from tunefork.train.loop import train
from tunefork.train.optim import ShadowAdamW
from tunefork.train.recovery import OnFault
from tunefork.train.unreached import is_due

EXAMPLES = examples((9, 4, 17, 6))
COMMON: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.01}


def _events(model: Any, optimizer: Any, num_steps: int) -> list[Event]:
    events: list[Event] = []
    train(
        model,
        EXAMPLES,
        [[0, 1, 2, 3]] * num_steps,
        optimizer,
        learning_rates=[1e-3] * num_steps,
        micro_batch_tokens=64,
        packing=True,
        pad_id=0,
        max_grad_norm=1.0,
        seed=0,
        on_fault=OnFault(on_event=events.append),
    )
    return events


def _lora() -> Any:
    model = tiny_model("llama")
    build(model, Method.LORA, LoraSection(rank=4), seed=0)
    return model


def test_a_layer_whose_gradients_are_lost_is_named_once() -> None:
    model = _lora()
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = layer.base.forward  # as if a compiler had lost its delta
    optimizer = LoraAdamW([p for p in model.parameters() if p.requires_grad], **COMMON)
    [warned] = _events(model, optimizer, 18)
    assert isinstance(warned, Warned) and (warned.code, warned.step) == ("no_gradient", 16)
    named = "model.layers.0.self_attn.q_proj.lora_a, model.layers.0.self_attn.q_proj.lora_b"
    assert f"reached 2 of {len(optimizer.parameters)} trained tensors: {named}." in warned.message


def test_where_all_are_reached_nothing_is_said() -> None:
    model = _lora()
    optimizer = LoraAdamW([p for p in model.parameters() if p.requires_grad], **COMMON)
    assert not _events(model, optimizer, 3)


@pytest.mark.parametrize("kind", ["fp32", "8-bit", "bf16"])
def test_full_fine_tuning_names_a_weight_that_the_model_does_not_use(kind: str) -> None:
    model = tiny_model("llama")
    # Large enough for 8-bit moments.
    model.unused = nn.Linear(96, 64, bias=False)
    if kind == "bf16":
        model.to(torch.bfloat16)
        optimizer: Any = Bf16AdamW(model.parameters(), seed=0, **COMMON)
    else:
        is_8_bit = kind == "8-bit"
        optimizer = ShadowAdamW(
            model.parameters(), keep_shadows=False, eight_bit=is_8_bit, **COMMON
        )
    [warned] = _events(model, optimizer, 3)
    assert isinstance(warned, Warned) and warned.step == 3
    assert "1 of " in warned.message and "tensors: unused.weight." in warned.message


def test_it_is_looked_at_once_in_a_run() -> None:
    assert [at for at in range(1, 41) if is_due(at, 40)] == [16]
    assert [at for at in range(1, 6) if is_due(at, 5)] == [5]
    assert not [at for at in range(1, 3) if is_due(at, 2)]  # a LoRA's A may have had none yet
