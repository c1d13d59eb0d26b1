"""Cases whose passes are captured where there is room, and how far each kind's time may be off."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tunefork.plan.batches import Batches
from tunefork.plan.built import Build
from tunefork.plan.case import Case
from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import target_of
from tunefork.plan.method import plan_method
from tunefork.plan.passes import Shape
from tunefork.recipe import FullSection, LoraSection, Method

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=12,
    num_attention_heads=4,
)
SHAPE = Shape(8, 2048, 8 * 2048, is_masked=False)
BATCHES = Batches(SHAPE, SHAPE, 1.0, 100, "one shape")


def _case(gpu: str = "h200", **more: Any) -> Case:
    made = Build(
        method=Method.LORA,
        lora=LoraSection(),
        full=FullSection(),
        dtype=torch.bfloat16,
        checkpointing="none",
        device="cuda",
        is_compiled=True,
    )
    target = target_of(load_catalogue().machine([gpu]))
    return Case(CONFIG, 1, replace(made, **more), target)


def test_where_graphs_have_no_room_memory_and_time_are_those_of_launched_passes() -> None:
    case = _case()
    wide = case.memory(SHAPE).process.high
    assert case.captures(case.step(SHAPE), SHAPE)
    least = case.launched.memory(SHAPE).process.high
    assert least < wide
    tight = replace(case, target=replace(case.target, memory_bytes=round(wide - 1)))
    assert tight.memory(SHAPE).process.high == least
    assert tight.captures(tight.step(SHAPE), SHAPE), "a first graph is still captured"
    roomy, launched = plan_method(case, BATCHES), plan_method(case.launched, BATCHES)
    found = plan_method(tight, BATCHES)
    assert found.fits and found.peak_process_bytes.high == least
    assert found.step_s == launched.step_s > roomy.step_s
    assert found.step_s_interval == launched.step_s_interval


@pytest.mark.parametrize("gpu", ["h200", "h100"])
def test_the_interval_is_that_of_the_kind_and_wider_on_a_device_never_measured(gpu: str) -> None:
    def error(case: Case) -> float:
        return case.time_error(case.step(SHAPE), SHAPE)

    case, fit = _case(gpu), _case(gpu).target.fit.time
    certain = replace(case, is_varied=False)
    assert error(certain) == pytest.approx(case.target.trust.time)
    wider = (1 + case.target.trust.time) / (1 + fit.error)
    assert (wider > 1.1) == (gpu != "h200")
    assert error(case) == pytest.approx(wider * (1 + fit.error_captured_varied) - 1)
    assert error(case.launched) == error(certain)
    offloaded = _case(gpu, checkpointing="offload")
    assert error(offloaded) == pytest.approx(wider * (1 + fit.error_offloaded) - 1)
