"""What tracing does not show, fitted to measured runs: fits.yaml, one entry a device and software.

Memory: the libraries' workspaces beside the traced tensors (a constant), the CUDA context, and what
the allocator holds without using it. Time: how far each kind of operation stays behind the data
sheet's rates, and what starting an operation costs the host. Each has relative errors, the largest
that any run showed, held out from the fit or not, from which intervals are made.

An entry's key is the device, the version of torch, the attention kernel and the quantiser, for a
residual is theirs together. `fit_for` takes the entry of the same device that has most of the rest,
torch first; what differs is said in the plan. A GPU that has no entry takes the H200's fractions of
its own data sheet's rates, with wider intervals.

benchmarks/planner_h200.py writes the H200's entry, benchmarks/planner_cpu.py the CPU's.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict

from tunefork.model import attention

UNMEASURED_MEMORY = 1.5
UNMEASURED_TIME = 3.0
"""By what intervals are widened for a device that no run was measured on."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class MemoryFit(_Model):
    """From traced tensors to a process."""

    workspace_bytes: float
    """Taken from PyTorch's allocator by libraries (cuBLAS): there from the first product on."""
    context_bytes: float
    """Of the process outside PyTorch's allocator."""
    held_constant_bytes: float
    """Held and not used, whatever the run."""
    held_per_dynamic: float
    """Held and not used, per byte that comes and goes within a step."""
    held_per_recomputed: float
    """The same with activation checkpointing, where what comes and goes is more various."""
    held_per_captured: float
    """On top of either, where the passes are captured: CUDA graphs have a pool of their own."""
    held_per_varied: float
    """On top of either, where the passes are of many lengths: what one was cut from does not suit
    the next, and a CPU's allocator (glibc's heap) is left with gaps."""
    held_per_captured_varied: float
    """In place of these two where both are so: some passes are captured and others launched, which
    need a pool beside the graphs' that is as large."""
    held_per_room: float
    """Per byte of the room that the optimiser's update takes."""
    tensor_error: float
    """Relative; of `peak_tensor_bytes`."""
    process_less: float
    """Relative: how much less than its `peak_process_bytes` a run took."""
    process_less_bytes: float
    """Beyond that: what an allocator's segments make uncertain is no share of a model's size."""
    process_more: float
    """How much more. That a run does not fit is found out too late, so the two are apart."""
    process_more_bytes: float


class TimeFit(_Model):
    """Time over what the data sheet's rates would give, and the host's part."""

    gemm: float
    gemm_int8: float
    """Over the data sheet's int8 rate; bf16's where none is given."""
    fused: float
    """What a compiled layer does between its products."""
    skinny: float
    attention: float
    masked_attention: float
    memory: float
    dequantize: float
    optimizer: float
    eight_bit_s: float
    """Of the 8-bit update, a parameter."""
    rounding_s: float
    """Of stochastic rounding, a parameter."""
    host_operation_s: float
    """To start one operation."""
    host_kernel_s: float
    """To start one kernel of a compiled layer."""
    captured_operation_s: float
    """To start either within a captured CUDA graph, where the device does it."""
    host_skinny_s: float
    """To start one of LoRA's products, beyond that: an operator of our own, called by Python."""
    host_dequantize_s: float
    """To dequantise one weight, beyond that."""
    host_update: float
    """Of starting one operation, in the update of one tensor after another (full fine-tuning)."""
    host_layer_s: float
    """To recompute one layer (activation checkpointing), beyond its operations."""
    pass_s: float
    """Once a forward and backward pass: its batch laid out, copied, its mask made."""
    step_s: float
    """Once a step."""
    is_overlapped: bool
    """The host runs ahead of the device (a GPU); on a CPU the two are one."""
    error: float
    """Relative; of `step_s`, the larger over the smaller of prediction and truth, less 1."""
    error_launched: float
    """The same where Python launches each operation, as the layers are not compiled: hosts that are
    rented with one kind of GPU differ by a third and more in that."""
    error_offloaded: float
    """The same of a pass whose activations are offloaded: its copies go at the pace of the host's
    memory, which differs from host to host and from step to step, and is no part of the fit."""
    error_captured_varied: float
    """The same where captured passes are of many lengths, beyond the time of a captured and that of
    a launched one: how many are launched hangs on the order in which the lengths come."""


_SIDES = {"process_less", "process_less_bytes", "process_more", "process_more_bytes"}
_BESIDE: dict[str, Any] = {
    "date": True,
    "runs": True,
    "memory": {"tensor_error", *_SIDES},
    "time": {"error", "error_launched", "error_offloaded", "error_captured_varied"},
}
"""What a fit holds beside what it predicts by."""


class Fit(_Model):
    """One device's."""

    device: str
    """A catalogue id, or "cpu"."""
    name: str
    """As PyTorch or the system names it."""
    torch: str
    """Version that it was measured with, as `2.11`."""
    attention: str
    """Kernel: `sdpa` is PyTorch's choice (on a GPU FlashAttention 2 without a mask)."""
    quantizer: str
    """Of a frozen base in 4 bits, with its version."""
    date: str
    runs: int
    """Measured runs behind it; those held out not counted."""
    flops: float | None = None
    """Measured peak rate where there is no data sheet (CPU), bf16 operations a second."""
    bandwidth: float | None = None
    """Likewise, bytes a second."""
    memory: MemoryFit
    time: TimeFit

    @property
    def id(self) -> str:
        """Another one for other predictions; intervals, the date and the count are no part."""
        predicts = self.model_dump_json(exclude=_BESIDE)
        return hashlib.sha256(predicts.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Software:
    """What a fit belongs to beside its device, the weightiest first."""

    torch: str
    attention: str
    quantizer: str


@dataclass(frozen=True, slots=True)
class Match:
    """The fit that was found for a device and software."""

    fit: Fit
    is_own: bool
    """Measured on that device."""
    differs: tuple[str, ...]
    """What of the software is another than the fit's, in words; empty for an exact match."""


def installed(kind: str) -> Software:
    """The software that a run on a device of `kind` ("cuda" or "cpu") would have here."""
    return Software(
        torch=minor(torch.__version__),
        attention="sdpa" if kind == "cuda" else attention.NAME,
        quantizer=_quantizer(),
    )


def _quantizer() -> str:
    try:
        return f"bitsandbytes {minor(version('bitsandbytes'))}"
    except PackageNotFoundError:
        return "none"


def minor(version: str) -> str:
    """`2.11` of `2.11.0+cu130`."""
    return ".".join(version.split(".")[:2])


@cache
def load_fits() -> tuple[Fit, ...]:
    """The packaged fits."""
    text = files("tunefork.plan").joinpath("fits.yaml").read_text(encoding="utf-8")
    return tuple(Fit.model_validate(row) for row in yaml.safe_load(text))


def fit_for(device: str, software: Software, fits: tuple[Fit, ...] | None = None) -> Match:
    """The nearest fit for a catalogue id or "cpu": the same device, then torch, attention,
    quantiser, then the newest; where the device has none, the H200's likewise."""
    known = load_fits() if fits is None else fits
    own = [fit for fit in known if fit.device == device]
    wanted = (software.torch, software.attention, software.quantizer)

    def rank(fit: Fit) -> tuple[bool, bool, bool, str]:
        has = (fit.torch, fit.attention, fit.quantizer)
        torch_is, attention_is, quantizer_is = (a == b for a, b in zip(has, wanted, strict=True))
        return torch_is, attention_is, quantizer_is, fit.date

    fit = max(own or [fit for fit in known if fit.device == _FALLBACK], key=rank)
    pairs = (
        (f"torch {fit.torch}", f"torch {software.torch}"),
        (f"attention {fit.attention}", f"attention {software.attention}"),
        (fit.quantizer, software.quantizer),
    )
    differs = tuple(f"{theirs} there, {ours} here" for theirs, ours in pairs if theirs != ours)
    return Match(fit, bool(own), differs)


_FALLBACK = "h200"
