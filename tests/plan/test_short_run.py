"""The short runs that predictions are fitted to."""

import os
import signal
from typing import Any

import pytest
import torch

from tests.tiny import CONFIGS
from tunefork.plan.built import Build
from tunefork.plan.short_run import WARM_UP, Measured, short_run
from tunefork.recipe import FullSection, LoraSection, Method
from tunefork.train.loop import train


def _run(num_steps: int) -> Measured:
    made = Build(Method.LORA, LoraSection(), FullSection(), torch.float32, "none", "cpu")
    return short_run(
        CONFIGS["llama"],
        made,
        [[16, 16]] * num_steps,
        micro_batch_tokens=32,
        packing=False,
        device=torch.device("cpu"),
    )


def test_the_median_of_the_timed_steps_is_the_figure() -> None:
    found = _run(WARM_UP + 3)
    assert len(found.steps_s) == 3
    assert found.step_s == sorted(found.steps_s)[1]
    assert len(found.losses) == len(found.shapes) == WARM_UP + 3


def test_one_that_is_asked_to_stop_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: Any, **more: Any) -> Any:
        on_step = more.pop("on_step")

        def and_stop(record: Any) -> None:
            on_step(record)
            os.kill(os.getpid(), signal.SIGTERM)

        return train(*arguments, on_step=and_stop, **more)

    monkeypatch.setattr("tunefork.plan.short_run.train", stopped)
    with pytest.raises(KeyboardInterrupt):
        _run(WARM_UP + 3)
