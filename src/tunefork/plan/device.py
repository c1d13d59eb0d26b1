"""What is planned for: GPUs of the catalogue, or the machine at hand."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import psutil
import torch

from tunefork.model.device import available_bytes, describe, pick_device, pick_dtype
from tunefork.plan.catalogue import Catalogue, Machine
from tunefork.plan.fits import UNMEASURED_MEMORY, UNMEASURED_TIME, Fit, Match, fit_for, installed
from tunefork.plan.measured import UNCHANGED, Factor, correction, recall
from tunefork.plan.time import Rates


@dataclass(frozen=True, slots=True)
class Trust:
    """How far predictions on a device go wrong, relative but for the bytes; and what its own runs
    correct them by."""

    tensors: float
    process_less: float
    process_more: float
    process_less_bytes: float
    process_more_bytes: float
    time: float
    process_factor: Factor = UNCHANGED
    time_factor: Factor = UNCHANGED


@dataclass(frozen=True, slots=True)
class Target:
    """A device, how many of them, and what is known of it."""

    id: str
    """A catalogue id, or "cpu"."""
    kind: Literal["cuda", "cpu"]
    count: int
    memory_bytes: int
    """Of one, that a process can take."""
    rates: Rates
    link_bandwidth: float
    """Bytes a second between two of them."""
    usd_per_hour: float | None
    """Of all of them."""
    fit: Fit
    trust: Trust
    note: str
    is_here: bool = False
    """It is the machine that plans, with the PyTorch that would train."""


def target_of(machine: Machine) -> Target:
    """GPUs of the catalogue."""
    gpu = machine.gpu
    found = fit_for(gpu.id, installed("cuda"))
    fit = found.fit
    basis = (
        f"fitted to {fit.runs} runs measured on this GPU with torch {fit.torch}"
        if found.is_own
        else f"efficiencies are those of {fit.name}; no run was measured on this GPU, so intervals "
        "are wider"
    )
    target = Target(
        id=gpu.id,
        kind="cuda",
        count=machine.count,
        memory_bytes=gpu.usable_bytes,
        rates=Rates(gpu.bf16_flops, gpu.bandwidth, gpu.int8_ops),
        link_bandwidth=gpu.link_bandwidth,
        usd_per_hour=gpu.usd_per_hour * machine.count,
        fit=fit,
        trust=_trust(fit, found.is_own),
        note=f"rates: {gpu.source} ({gpu.date}); price: {gpu.price_source} ({gpu.price_date}), "
        f"approximate; {basis}{_software(found)}",
    )
    return _corrected(target, lambda name: _is(gpu.name, name))


def here(
    catalogue: Catalogue, usd_per_hour: float | None = None, *, is_corrected: bool = True
) -> Target:
    """The machine at hand: its GPU, found in the catalogue by name, else its CPU.

    `is_corrected` lets its own finished runs correct the predictions.
    """
    device = pick_device()
    name = str(describe(device)["name"])
    target = _cpu() if device.type == "cpu" else _gpu(catalogue, name, describe(device))
    target = replace(target, is_here=True)
    if usd_per_hour is not None:
        target = replace(target, usd_per_hour=usd_per_hour)
    if not is_corrected:
        as_fitted = replace(target.trust, process_factor=UNCHANGED, time_factor=UNCHANGED)
        return replace(target, trust=as_fitted)
    return _corrected(target, lambda known: known == name)


def free_here(catalogue: Catalogue) -> Target:
    """`here` with the memory that no other process has.

    A CPU keeps all of it: what is free there says little, as caches are given up when asked for.
    """
    target, device = here(catalogue), pick_device()
    if device.type == "cpu":
        return target
    # The context of this process is there by now, and part of what is predicted.
    free = available_bytes(device) + round(target.fit.memory.context_bytes)
    return replace(target, memory_bytes=min(target.memory_bytes, free))


def _cpu() -> Target:
    found = fit_for("cpu", installed("cpu"))
    fit = found.fit
    assert fit.flops is not None and fit.bandwidth is not None
    cores = torch.get_num_threads()
    return Target(
        id="cpu",
        kind="cpu",
        count=1,
        memory_bytes=psutil.virtual_memory().total,
        rates=Rates(fit.flops * cores / _FITTED_CORES, fit.bandwidth),
        link_bandwidth=0.0,
        usd_per_hour=None,
        fit=fit,
        trust=_trust(fit, is_own=False),
        note=f"fitted to {fit.runs} runs on {fit.name}, scaled to {_many(cores, 'core')}; "
        f"`tunefork plan --calibrate` measures this machine{_software(found)}",
    )


def _software(found: Match) -> str:
    """What the plan says where its fit was measured with other software."""
    if not found.differs:
        return ""
    return f"; the fit was measured with other software ({'; '.join(found.differs)})"


_FITTED_CORES = 2
"""Of the machine behind the CPU's fit."""


def _gpu(catalogue: Catalogue, name: str, facts: dict[str, str | int]) -> Target:
    total = int(facts["memory_bytes"])
    known = [gpu for gpu in catalogue.gpus if _is(gpu.name, name)]
    nearest = min(known or catalogue.gpus, key=lambda gpu: abs(gpu.usable_bytes - total))
    target = target_of(Machine(nearest, 1))
    if known:
        return replace(target, memory_bytes=total)
    return replace(
        target,
        memory_bytes=total,
        usd_per_hour=None,
        trust=_trust(target.fit, is_own=False),
        note=f"{name} is not in the catalogue, so it is planned with the rates of {nearest.name}; "
        "`tunefork plan --calibrate` measures it, and a catalogue file can describe it",
    )


def _trust(fit: Fit, is_own: bool) -> Trust:
    """Tensors are the same on every device; the context, what is held and speed are not."""
    memory, time = (1.0, 1.0) if is_own else (UNMEASURED_MEMORY, UNMEASURED_TIME)
    return Trust(
        tensors=fit.memory.tensor_error,
        process_less=fit.memory.process_less * memory,
        process_more=fit.memory.process_more * memory,
        process_less_bytes=fit.memory.process_less_bytes * memory,
        process_more_bytes=fit.memory.process_more_bytes * memory,
        time=fit.time.error * time,
    )


def _corrected(target: Target, is_device: Callable[[str], bool]) -> Target:
    """By what runs on the device took."""
    found = correction(recall(is_device, target.fit.id))
    if not found.runs:
        return target
    fit, trust = target.fit, target.trust
    # Where the device's own spread is known, what was put on for one that is not goes.
    known = trust if found.process_error is None else fit.memory
    return replace(
        target,
        trust=replace(
            trust,
            process_less_bytes=known.process_less_bytes,
            process_more_bytes=known.process_more_bytes,
            process_less=_error(found.process_error, fit.memory.process_less, trust.process_less),
            process_more=_error(found.process_error, fit.memory.process_more, trust.process_more),
            time=_error(found.time_error, fit.time.error, trust.time),
            process_factor=found.process,
            time_factor=found.time,
        ),
        note=f"{target.note}; corrected by {_many(found.runs, 'run')} measured on this "
        f"device (time x {found.time.ratio:.2f}, by {found.time.most:.2g} s a step at most; "
        f"process memory x {found.process.ratio:.2f}, by {found.process.most / 1e9:.2f} GB at "
        "most)",
    )


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _error(measured: float | None, packaged: float, widened: float) -> float:
    """Of corrected predictions: the device's own spread if it has one, with a floor under it."""
    return widened if measured is None else max(measured, packaged)


def _is(entry: str, reported: str) -> bool:
    """Whether the driver's name is a catalogue entry's: `NVIDIA H100 80GB HBM3` and `H100 SXM`.

    The model's number must be the same, and the memory where both say it.
    """
    ours, theirs = _numbers(entry), _numbers(reported)
    sizes = [[word for word in words if word.endswith("gb")] for words in (ours, theirs)]
    return bool(ours) and ours[0] in theirs and (not all(sizes) or sizes[0] == sizes[1])


def _numbers(name: str) -> list[str]:
    """`["a100", "80gb"]` of `A100 SXM 80 GB`."""
    words: list[str] = re.findall(r"[a-z]*\d+[a-z]*", name.lower().replace(" gb", "gb"))
    return words


def dtype_for(target: Target, precision: str) -> torch.dtype:
    """Dtype of weights and activations on the target."""
    return pick_dtype(precision, torch.device(target.kind))
