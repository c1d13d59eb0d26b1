"""`tunefork plan --calibrate`: a few short runs on the machine at hand, predicted and measured.

They run as `tunefork train` would: on a GPU their layers are compiled.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import torch

from tunefork.model.device import describe, pick_device, pick_dtype
from tunefork.plan.batches import Batches
from tunefork.plan.built import Build
from tunefork.plan.case import Case
from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import here
from tunefork.plan.measured import Measurement, remember
from tunefork.plan.method import step_seconds
from tunefork.plan.passes import Shape
from tunefork.plan.shape import config_for, count_params
from tunefork.plan.short_run import WARM_UP, short_run
from tunefork.recipe import FullSection, LoraSection, Method
from tunefork.train.engine import compiles

_STEPS = 8
_SIZES = {"cpu": (0.1345e9,), "cuda": (0.1345e9, 1.236e9)}
"""Parameters of the models that are run."""
_ROWS = {"cpu": ((2, 128), (4, 256)), "cuda": ((8, 1024),)}
"""Of their passes, and tokens in each. On a GPU one, for every other is compiled anew."""


def calibrate(say: Callable[[str], None] = print) -> None:
    """Run and remember; `say` gets a line a run. Takes some minutes."""
    device = pick_device()
    target = here(load_catalogue(), is_corrected=False)
    name = str(describe(device)["name"])
    for size, method, shape in _runs(device.type):
        config = config_for(size)
        made = build_on(device, method)
        case = Case(config, count_params(config), made, target, is_varied=False)
        if not case.fits(shape):
            continue
        measurement = _measure(case, shape, device, name)
        remember(measurement)
        say(
            f"{measurement.case}: step {measurement.measured_step_s:.3f} s, predicted "
            f"{measurement.predicted_step_s:.3f}; memory "
            f"{measurement.measured_process_bytes / 2**30:.2f} GiB, predicted "
            f"{measurement.predicted_process_bytes / 2**30:.2f}"
        )


def build_on(device: torch.device, method: Method) -> Build:
    """How a run of `method` is built there."""
    return Build(
        method=method,
        lora=LoraSection(),
        full=FullSection(),
        dtype=pick_dtype("auto", device),
        checkpointing="none",
        device=device.type,
        is_compiled=compiles("always", device.type, WARM_UP + _STEPS),
    )


def _runs(kind: str) -> Iterator[tuple[float, Method, Shape]]:
    for size in _SIZES[kind]:
        for method in Method:
            for rows, length in _ROWS[kind]:
                yield size, method, Shape(rows, length, rows * (length - 1), is_masked=False)


def _measure(case: Case, shape: Shape, device: torch.device, name: str) -> Measurement:
    measured = short_run(
        case.config,
        case.made,
        [[shape.length] * shape.rows] * (WARM_UP + _STEPS),
        micro_batch_tokens=shape.rows * shape.length,
        packing=False,
        device=device,
    )
    batches = Batches(shape, shape, 1.0, 1, "one shape")
    return Measurement(
        device=name,
        case=f"{case.total_params / 1e9:.3g}B {case.made.method} {shape.rows} x {shape.length}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        predicted_step_s=step_seconds(case, batches),
        measured_step_s=measured.step_s,
        predicted_process_bytes=case.memory(shape).process.mid,
        measured_process_bytes=measured.process_bytes,
        fit=case.target.fit.id,
    )
