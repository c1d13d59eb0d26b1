"""The kernels of `kernels/adamw.py`, launched with as little work of the host as Triton lets.

Full fine-tuning starts one for each weight, some hundred in a step, most of them done in
20 microseconds: torch.compile's checks and the Python around them (200 microseconds, measured on an
H200) kept the GPU waiting. So all that changes from step to step is a number among the arguments,
nothing is copied to the device, and one launch serves a weight of any size.

Random bits are the definition's. What is rounded by them may lie 2**-22 beside it: multiply-adds
are fused, root and quotient approximate, and `lerp` has one form for all factors. One rounding in
some thousands falls differently.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_NUM_WARPS = 4  # 8 elements a thread: 16 bytes of bf16 at once
_NUM_WARPS_WIDE = 8  # 16 bytes of fp32: with more, stores go through shared memory


@triton.jit
def mix(bits):
    """`adamw.mix`, of uint32."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _noise(first, local, weight_key, step_key):
    """`adamw.noise`, uint32. An element's number, of any size, counts modulo 2**32."""
    index = first.to(tl.uint32) + local.to(tl.uint32)
    return mix(mix(index ^ weight_key.to(tl.uint32)) + step_key.to(tl.uint32))


@triton.jit
def _rounded(wide, noise):
    """`adamw.rounded`: by `noise`, 0 to 65,535, and a NaN is left."""
    bits = (wide.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    return tl.where(wide == wide, bits.to(tl.float32, bitcast=True), wide).to(tl.bfloat16)


@triton.jit
def _moved(p, g, m, v, decay, rate, g_scale, new_m, new_v, v_scale, eps):
    """`adamw._moved`."""
    g = g.to(tl.float32) * g_scale
    m, v = m.to(tl.float32), v.to(tl.float32)
    m += new_m * (g - m)
    v += new_v * (g * g - v)
    return p.to(tl.float32) * decay - rate * m / (tl.sqrt(v) * v_scale + eps), m, v


@triton.jit(do_not_specialize=["weight_key", "step_key"])
def _update(
    p, g, m, v, numel, weight_key, step_key,
    decay, rate, g_scale, new_m, new_v, v_scale, eps, block: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * block
    local = tl.arange(0, block)
    inside = local < numel - first
    old_p = tl.load(p + first + local, mask=inside)
    grad = tl.load(g + first + local, mask=inside)
    old_m = tl.load(m + first + local, mask=inside)
    old_v = tl.load(v + first + local, mask=inside)
    wide_p, wide_m, wide_v = _moved(
        old_p, grad, old_m, old_v, decay, rate, g_scale, new_m, new_v, v_scale, eps
    )
    noise = _noise(first, local, weight_key, step_key)
    if p.dtype.element_ty == tl.bfloat16:
        wide_p = _rounded(wide_p, mix(noise) & 0xFFFF)
    tl.store(p + first + local, wide_p, mask=inside)
    tl.store(m + first + local, _rounded(wide_m, noise & 0xFFFF), mask=inside)
    tl.store(v + first + local, _rounded(wide_v, noise >> 16), mask=inside)


@triton.jit(do_not_specialize=["weight_key", "step_key"])
def _update_wide(
    p, g, m, v, source, numel, weight_key, step_key,
    decay, rate, g_scale, new_m, new_v, v_scale, eps, block: tl.constexpr,
):  # fmt: skip
    """`source` holds p before the update: the fp32 shadow, or p itself."""
    first = tl.program_id(0).to(tl.int64) * block
    local = tl.arange(0, block)
    inside = local < numel - first
    old_p = tl.load(source + first + local, mask=inside)
    grad = tl.load(g + first + local, mask=inside)
    old_m = tl.load(m + first + local, mask=inside)
    old_v = tl.load(v + first + local, mask=inside)
    wide_p, wide_m, wide_v = _moved(
        old_p, grad, old_m, old_v, decay, rate, g_scale, new_m, new_v, v_scale, eps
    )
    tl.store(m + first + local, wide_m, mask=inside)
    tl.store(v + first + local, wide_v, mask=inside)
    if source.dtype.element_ty == tl.float32:
        tl.store(source + first + local, wide_p, mask=inside)
        tl.store(p + first + local, wide_p.to(tl.bfloat16), mask=inside)
    else:
        noise = _noise(first, local, weight_key, step_key)
        tl.store(p + first + local, _rounded(wide_p, noise & 0xFFFF), mask=inside)


@triton.jit(do_not_specialize=["weight_key", "step_key"])
def _round_to(p, wide, numel, weight_key, step_key, block: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * block
    local = tl.arange(0, block)
    inside = local < numel - first
    value = tl.load(wide + first + local, mask=inside)
    noise = _noise(first, local, weight_key, step_key)
    tl.store(p + first + local, _rounded(value, noise & 0xFFFF), mask=inside)


def update_(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, factors: Sequence[float], keys: tuple[int, int]
) -> None:
    """`adamw.adamw_bf16_` on contiguous tensors of any size."""
    numel = p.numel()
    _update[(triton.cdiv(numel, _BLOCK),)](
        p, g, m, v, numel, *keys, *factors, _BLOCK, num_warps=_NUM_WARPS
    )
    _tell_autograd(p)


def update_wide_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    factors: Sequence[float],
    keys: tuple[int, int],
    shadow: Tensor | None,
) -> None:
    """`adamw.adamw_wide_` on contiguous tensors of any size."""
    numel = p.numel()
    source = p if shadow is None else shadow
    _update_wide[(triton.cdiv(numel, _BLOCK),)](
        p, g, m, v, source, numel, *keys, *factors, _BLOCK, num_warps=_NUM_WARPS_WIDE
    )
    _tell_autograd(p)


def round_to_(p: Tensor, wide: Tensor, keys: tuple[int, int]) -> None:
    """`adamw.round_to_` on contiguous tensors of any size."""
    numel = p.numel()
    _round_to[(triton.cdiv(numel, _BLOCK),)](p, wide, numel, *keys, _BLOCK, num_warps=_NUM_WARPS)
    _tell_autograd(p)


def _tell_autograd(p: Tensor) -> None:
    """A backward pass that is still to read p is to fail (`train/release.py`): Triton says nothing
    of what it writes."""
    torch.autograd.graph.increment_version(p)
