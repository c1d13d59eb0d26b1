"""Seconds of a step: a roofline over the traced work.

The roofline is Williams, Waterman and Patterson 2009, https://doi.org/10.1145/1498765.1498785.

    device = sum over kinds of operation: work / data sheet's rate * fitted factor
    host   = operations * fitted seconds to start one
    step   = the longer of the two on a GPU, where the host runs ahead; their sum on a CPU

Products count operations; what moves memory counts bytes, each operation's inputs and outputs once.
A skinny product (LoRA's) reads a whole activation for few operations, so it counts bytes too. A
pass captured in a CUDA graph has no host; each of its kernels takes the device a moment to start.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tunefork.plan.fits import TimeFit
from tunefork.plan.optimizer import Update
from tunefork.plan.trace import Work

_SHARPNESS = 8
"""Of the smooth maximum of device and host."""

_NONE = Work()


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device could do at best."""

    flops: float
    """bf16 operations a second."""
    bandwidth: float
    """Bytes a second."""
    int8_ops: float | None = None
    """int8 operations a second; None where tunefork's were never timed."""


def pass_seconds(
    work: Mapping[str, Work],
    rates: Rates,
    fit: TimeFit,
    *,
    is_masked: bool,
    is_compiled: bool = False,
    is_captured: bool = False,
    num_recomputed: int = 0,
) -> float:
    """A forward and backward pass in which `num_recomputed` layers, as written, run twice."""
    gemm, skinny = work.get("gemm", _NONE), work.get("skinny", _NONE)
    gemm_int8, fused = work.get("gemm_int8", _NONE), work.get("fused", _NONE)
    attention, memory = work.get("attention", _NONE), work.get("memory", _NONE)
    dequantize = work.get("dequantize", _NONE)
    factor = fit.masked_attention if is_masked else fit.attention
    device = gemm.flops / rates.flops * fit.gemm
    device += gemm_int8.flops / (rates.int8_ops or rates.flops) * fit.gemm_int8
    device += fused.num_bytes / rates.bandwidth * fit.fused
    device += attention.flops / rates.flops * factor
    device += skinny.num_bytes / rates.bandwidth * fit.skinny
    device += memory.num_bytes / rates.bandwidth * fit.memory
    device += dequantize.num_bytes / rates.bandwidth * fit.dequantize
    count = sum(done.count for done in work.values())
    if is_captured:
        return fit.pass_s + device + count * fit.captured_operation_s
    # Of a compiled pass only what is around the layers is started by Python, one by one.
    kernels = count - memory.count if is_compiled else 0
    host = kernels * fit.host_kernel_s + (count - kernels) * fit.host_operation_s
    if not is_compiled:
        host += dequantize.count * fit.host_dequantize_s + skinny.count * fit.host_skinny_s
    host += num_recomputed * fit.host_layer_s
    return fit.pass_s + _together(device, host, fit)


def update_seconds(update: Update, rates: Rates, fit: TimeFit) -> float:
    """Clipping and the optimiser's update."""
    device = update.moved_bytes / rates.bandwidth * fit.optimizer
    device += update.eight_bit_params * fit.eight_bit_s + update.rounded_params * fit.rounding_s
    host = update.num_operations * fit.host_update * fit.host_operation_s
    return fit.step_s + _together(device, host, fit)


def _together(device: float, host: float, fit: TimeFit) -> float:
    if not fit.is_overlapped:
        return device + host
    longer, shorter = max(device, host), min(device, host)
    if longer <= 0.0:
        return 0.0
    smooth: float = longer * (1 + (shorter / longer) ** _SHARPNESS) ** (1 / _SHARPNESS)
    return smooth
