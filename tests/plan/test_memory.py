"""From a step's tensors to a process."""

import pytest
import torch

from tests.tiny import CONFIGS
from tunefork.plan.built import Build
from tunefork.plan.device import Trust
from tunefork.plan.fits import load_fits
from tunefork.plan.measured import Factor
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


def test_a_processs_interval_is_some_bytes_and_a_share_each_side_by_itself() -> None:
    (fit,) = (fit.memory for fit in load_fits() if fit.device == "h200")
    made = Build(Method.LORA, LoraSection(), FullSection(), torch.bfloat16, "none", "cuda")
    step = trace_step(CONFIGS["llama"], made, Shape(4, 64, 200, is_masked=False))
    trust = Trust(0.05, 0.02, 0.03, 4e6, 7e6, 0.0, process_factor=Factor(1.1))
    found = measure(step, fit, trust, shards=1, is_recomputed=False)
    mid = found.process.mid
    assert found.process.low == pytest.approx(0.98 * mid - 4e6)
    assert found.process.high == pytest.approx(1.03 * mid + 7e6)
    assert found.process_high(round(found.tensors.mid)) == pytest.approx(found.process.high)
    assert found.tensors.low == pytest.approx(0.95 * found.tensors.mid)
    assert found.tensors.high == pytest.approx(1.05 * found.tensors.mid)

    unsure = Trust(0.05, 0.02, 0.03, 1e15, 0.0, 0.0)
    assert measure(step, fit, unsure, shards=1, is_recomputed=False).process.low == 0.0


def test_wider_intervals_leave_a_fit_the_one_that_runs_were_predicted_by() -> None:
    (fit,) = (fit for fit in load_fits() if fit.device == "h200")
    memory = fit.memory.model_copy(update={"process_more": 0.9, "tensor_error": 0.9})
    time = fit.time.model_copy(update={"error": 0.9})
    wider = fit.model_copy(update={"memory": memory, "time": time, "date": "2030-01-01", "runs": 1})
    assert wider.id == fit.id
    other = fit.memory.model_copy(update={"context_bytes": 1.0})
    assert fit.model_copy(update={"memory": other}).id != fit.id
