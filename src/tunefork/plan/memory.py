"""Bytes by phase and part, and their intervals: the peak is the highest phase's, not a sum.

    load               weights; nothing else is on the device yet
    forward_backward   the highest of the traced step's moments
    optimizer          weights, gradients, optimiser states, and the room that the update takes
    evaluate           weights and a forward pass without gradients
    save               weights: copies are made in host memory

Over n GPUs (sharded as FSDP2 does; https://arxiv.org/abs/2304.11277) weights, gradients and
optimiser states are divided by n, and two layers' weights are gathered at a time, the one at work
and the next.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tunefork.plan.device import Trust
from tunefork.plan.fits import MemoryFit
from tunefork.plan.one_pass import Step
from tunefork.plan.schema import Interval, Part, Phase, PhaseName

_SHARDED: tuple[Part, ...] = ("weights", "gradients", "optimizer")


@dataclass(frozen=True, slots=True)
class Memory:
    """What a method takes on each device."""

    phases: dict[PhaseName, Phase]
    tensors: Interval
    process: Interval
    moments_high: dict[str, float]
    """High end of the process's bytes at the highest moment of each segment of a pass."""
    process_high: Callable[[int], float]
    """High end of the process's bytes, from those of its tensors."""


def measure(
    step: Step,
    fit: MemoryFit,
    trust: Trust,
    *,
    shards: int,
    is_recomputed: bool,
    is_captured: bool = False,
    is_varied: bool = True,
    loaded_bytes: int = 0,
) -> Memory:
    """Memory of a traced step on each of `shards` devices.

    `is_varied`: its passes are of many lengths. `loaded_bytes`: weights that are there while
    loading only, before they are quantised in place.
    """
    gathered = 2 * step.layer_bytes if shards > 1 else 0
    room = step.update.room_bytes // shards

    def phase(parts: dict[Part, int]) -> Phase:
        own = {p: n // shards if p in _SHARDED else n for p, n in parts.items() if n}
        own["workspace"] = own.get("workspace", 0) + round(fit.workspace_bytes) + gathered
        return Phase(tensor_bytes=sum(own.values()), parts=own)

    weights: dict[Part, int] = {"weights": step.static.get("weights", 0)}
    moments = {segment: phase(peak.parts) for segment, peak in step.peaks.items()}
    phases: dict[PhaseName, Phase] = {
        "load": phase({"weights": max(weights["weights"], loaded_bytes)}),
        "forward_backward": max(moments.values(), key=lambda moment: moment.tensor_bytes),
        "optimizer": phase({**step.static, "gradients": step.held_gradients, "workspace": room}),
        **({"evaluate": phase(step.evaluation.parts)} if step.evaluation else {}),
        "save": phase(weights),
    }
    static = sum(step.static.values()) // shards
    rate = fit.held_per_recomputed if is_recomputed else fit.held_per_dynamic
    if is_captured:
        rate += fit.held_per_captured_varied if is_varied else fit.held_per_captured
    elif is_varied:
        rate += fit.held_per_varied

    def process(tensor_bytes: int) -> float:
        held = fit.held_constant_bytes + rate * max(0, tensor_bytes - static)
        whole = tensor_bytes + held + fit.held_per_room * room + fit.context_bytes
        return trust.process_factor.of(whole)

    def process_high(tensor_bytes: int) -> float:
        return process(tensor_bytes) * (1 + trust.process_more) + trust.process_more_bytes

    peak = max(phase.tensor_bytes for phase in phases.values())
    least = process(peak) * (1 - trust.process_less) - trust.process_less_bytes
    return Memory(
        phases=phases,
        tensors=around(peak, trust.tensors),
        process=Interval(low=max(0.0, least), mid=process(peak), high=process_high(peak)),
        moments_high={
            segment: process_high(moment.tensor_bytes) for segment, moment in moments.items()
        },
        process_high=process_high,
    )


def around(mid: float, error: float) -> Interval:
    """`mid` with a relative error."""
    return Interval(low=mid * (1 - error), mid=mid, high=mid * (1 + error))
