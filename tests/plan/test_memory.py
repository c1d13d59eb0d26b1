"""From a step's tensors to a process."""

import pytest
import torch

from tests.tiny import CONFIGS
from tunefork.plan.built import Build
from tunefork.plan.device import Trust
from tunefork.plan.fits import load_fits
from tunefork.plan.memory import measure
from tunefork.plan.passes import Shape
from tunefork.plan.step import trace_step
from tunefork.recipe import FullSection, LoraSection, Method


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_passes_of_many_lengths_leave_gaps_in_a_cpus_heap(is_recomputed: bool) -> None:
    (fit,) = (fit.memory for fit in load_fits() if fit.device == "cpu")
    assert fit.held_per_varied > 0.1
    made = Build(Method.LORA, LoraSection(), FullSection(), torch.bfloat16, "none", "cpu")
    step = trace_step(CONFIGS["llama"], made, Shape(4, 64, 200, is_masked=False))
    alike, varied = (
        measure(
            step,
            fit,
            Trust(0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
            shards=1,
            is_recomputed=is_recomputed,
            is_varied=is_varied,
        )
        for is_varied in (False, True)
    )
    assert varied.tensors == alike.tensors
    comes_and_goes = alike.tensors.mid - sum(step.static.values())
    assert varied.process.mid - alike.process.mid == pytest.approx(
        fit.held_per_varied * comes_and_goes
    )
