"""AdamW whose weights and moments are bf16, in one pass, rounded stochastically.

Nearest rounding would freeze both: a weight loses every update below 1/256 of itself, and the
second moment, which moves by 0.1 % a step (beta2 = 0.999), would hardly ever move. Rounded up or
down with the probability that keeps the mean, both follow fp32 in the mean (Gupta et al. 2015,
https://arxiv.org/abs/1502.02551; AdamW: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101,
algorithm 2).

The random bits are a hash of (weight, step, element): no state to keep, so a resumed run draws the
same, and a CPU draws what a GPU does. One source serves both: on a GPU `torch.compile` makes one
kernel of it, which reads p, g, m, v and writes p, m, v, 14 bytes a weight; sizes are dynamic
and all that changes from step to step is a tensor, so nothing is compiled again. On a CPU it
runs as written, by pieces that stay in the cache.

Shape legend: n = elements, any shape, the same for p, g, m and v.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

_ROW = 64
"""A size that is a multiple of it is known to the compiler as one, so that loads are vectors."""
_WARM_UP = 2**20
_PIECE = {"cpu": 2**17, "cuda": 2**30}
"""Most elements of one call: of a CPU's cache, and of what an int32 can number."""


def key(*parts: int | str) -> int:
    """An int32 that hangs on all of `parts`."""
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little", signed=True)


def keys_of(seed: int, steps: Mapping[int, int], device: torch.device) -> dict[int, Tensor]:
    """The keys (`noise`) of each weight, numbered, at its own step; copied to the device at once.

    Rows of 16 bytes, as compiled code copies a tensor that starts elsewhere.
    """
    rows = [[key(seed, "weight", n), key(seed, "step", step), 0, 0] for n, step in steps.items()]
    table = torch.tensor(rows, dtype=torch.int32).view(-1, 4).to(device)
    return dict(zip(steps, table, strict=True))


def mix(bits: Tensor) -> Tensor:
    """A bijection of int32 under which neighbours have nothing in common.

    `lowbias32` of https://github.com/skeeto/hash-prospector: a flipped input bit flips each output
    bit with a probability within 0.2 % of a half. Products wrap; int32 shifts keep the sign, so
    what they bring in is masked off.
    """
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return bits ^ ((bits >> 16) & 0xFFFF)


def noise(like_n: Tensor, keys: Tensor) -> Tensor:
    """32 random bits for each element, int32. `keys`: weight, step, number of the first element."""
    index_n = torch.arange(like_n.numel(), dtype=torch.int32, device=like_n.device)
    return mix(mix((index_n.view(like_n.shape) + keys[2]) ^ keys[0]) + keys[1])


def rounded(wide_n: Tensor, noise_n: Tensor) -> Tensor:
    """fp32 rounded to a neighbour in bf16, up or down, by 16 bits of `noise_n` (0 to 65,535).

    bf16 is fp32 without its lower 16 bits: the noise is added to them, and what carries over rounds
    up (away from zero, as the bits hold a magnitude). A NaN, which could carry into the sign and
    come out as zero, is left.
    """
    bits_n = (wide_n.view(torch.int32) + noise_n) & -(2**16)
    return torch.where(wide_n.isnan(), wide_n, bits_n.view(torch.float32)).to(torch.bfloat16)


def adamw_bf16_(
    p_n: Tensor, g_n: Tensor, m_n: Tensor, v_n: Tensor, factors: Tensor, keys: Tensor
) -> None:
    """Update p, m and v in place.

    p: bf16, or fp32, which is not rounded; m, v: bf16; g: either. `factors` are those of
    `factors_of`, fp32; `keys` (3) as in `noise`, int32. Both lie on p's device.
    """
    decay, rate, g_scale, new_m, new_v, v_scale, eps = factors.unbind()
    noise_n = noise(p_n, keys)
    g_n = g_n.float() * g_scale
    m_wide_n = torch.lerp(m_n.float(), g_n, new_m)
    v_wide_n = torch.lerp(v_n.float(), g_n * g_n, new_v)
    p_wide_n = p_n.float() * decay - rate * m_wide_n / (v_wide_n.sqrt() * v_scale + eps)
    if p_n.dtype == torch.bfloat16:
        p_wide_n = rounded(p_wide_n, mix(noise_n) & 0xFFFF)
    p_n.copy_(p_wide_n)
    m_n.copy_(rounded(m_wide_n, noise_n & 0xFFFF))
    v_n.copy_(rounded(v_wide_n, (noise_n >> 16) & 0xFFFF))


def factors_of(
    step: int,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    gradient_scale: float,
    eps: float = 1e-8,
) -> list[float]:
    """What `adamw_bf16_` multiplies with at `step`, from 1 (biases are corrected by it)."""
    beta1, beta2 = betas
    return [
        1.0 - learning_rate * weight_decay,
        learning_rate / (1.0 - beta1**step),
        gradient_scale,
        1.0 - beta1,
        1.0 - beta2,
        (1.0 - beta2**step) ** -0.5,
        eps,
    ]


def round_to_(p_n: Tensor, wide_n: Tensor, keys: Tensor) -> None:
    """Set p, bf16, to `wide_n`, fp32, rounded stochastically; `keys` as in `noise`."""
    p_n.copy_(rounded(wide_n, noise(wide_n, keys) & 0xFFFF))


@torch.no_grad()
def update_bf16_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, factors: Tensor, keys: Tensor) -> None:
    """`adamw_bf16_` on contiguous tensors of any size, compiled on a GPU."""
    for (p_n, g_n, m_n, v_n), own in _pieces((p, g, m, v), keys):
        _fastest(adamw_bf16_, p)(p_n, g_n, m_n, v_n, factors, own)


@torch.no_grad()
def write_rounded_(p: Tensor, wide: Tensor, keys: Tensor) -> None:
    """`round_to_` on contiguous tensors of any size, compiled on a GPU."""
    for (p_n, wide_n), own in _pieces((p, wide), keys):
        _fastest(round_to_, p)(p_n, wide_n, own)


def prepare(device: torch.device, *, only_rounds: bool = False) -> None:
    """Compile `update_bf16_`, or `write_rounded_`, before the first step.

    Its time would otherwise be no measure of the others'. At a size from which the compiler picks
    large blocks: the first weight may be a small one.
    """
    if device.type != "cuda":
        return
    [keys] = keys_of(0, {0: 0}, device).values()
    for numel in (_WARM_UP, _WARM_UP + 1):
        p, g, m, v = (torch.zeros(numel, dtype=torch.bfloat16, device=device) for _ in range(4))
        if only_rounds:
            write_rounded_(p, g.float(), keys)
        else:
            update_bf16_(p, g, m, v, torch.ones(7, device=device), keys)


def _fastest(function: Callable[..., None], tensor: Tensor) -> Callable[..., None]:
    return compiled(function) if tensor.is_cuda else function


@cache
def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """`function` in one kernel for all sizes."""
    found: Callable[..., None] = torch.compile(function, fullgraph=True)
    return found


def _pieces(tensors: Sequence[Tensor], keys: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The same part of each tensor, and the keys with the number of the part's first element."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    is_cuda = tensors[0].is_cuda
    size = _PIECE["cuda" if is_cuda else "cpu"]
    for first in range(0, flat[0].numel(), size):
        parts = [tensor[first : first + size] for tensor in flat]
        if len(parts[0]) % _ROW == 0 and len(parts[0]) > _ROW:  # one row would be a case apart
            parts = [part.view(-1, _ROW) for part in parts]
        if is_cuda:
            for part in parts:  # else the first size would be compiled by itself
                torch._dynamo.maybe_mark_dynamic(part, 0)
        own = keys
        if first:
            own = keys.clone()
            own[2] += first
        yield parts, own
