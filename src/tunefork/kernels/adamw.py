"""AdamW on bf16 weights in one pass, rounded stochastically; its moments are bf16 or fp32.

Nearest rounding would freeze both: a weight loses every update below 1/256 of itself, and the
second moment, which moves by 0.1 % a step (beta2 = 0.999), would hardly ever move. Rounded up or
down with the probability that keeps the mean, both follow fp32 in the mean (Gupta et al. 2015,
https://arxiv.org/abs/1502.02551; AdamW: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101,
algorithm 2). fp32 moments ("wide") are not rounded, and a weight that has an fp32 shadow beside it
follows that, rounded to nearest.

The random bits are a hash of (weight, step, element): no state to keep, so a resumed run draws the
same, and a CPU draws what a GPU does. The definition is here and runs on a CPU, by pieces that stay
in the cache. On a GPU it is one kernel (`kernels/adamw_triton.py`), which reads p, g, m, v and
writes p, m, v: 14 bytes a weight, with fp32 moments 22, and with a shadow 28.

Shape legend: n = elements, any shape, the same for p, g, m and v.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

_PIECE = 2**17
"""Elements that a CPU's cache holds."""

Keys = tuple[int, int]
"""What a weight's random bits hang on in a step: the `key` of the weight, and of the step."""


@lru_cache(2**14)  # weights are asked for again in every step, and a step by all of them
def key(*parts: int | str) -> int:
    """An int32 that hangs on all of `parts`."""
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little", signed=True)


def keys_of(seed: int, steps: Mapping[int, int]) -> dict[int, Keys]:
    """The keys of each weight, numbered, at its own step."""
    return {n: (key(seed, "weight", n), key(seed, "step", step)) for n, step in steps.items()}


def mix(bits: Tensor) -> Tensor:
    """A bijection of int32 under which neighbours have nothing in common.

    `lowbias32` of https://github.com/skeeto/hash-prospector: a flipped input bit flips each output
    bit with a probability within 0.2 % of a half. Products wrap; int32 shifts keep the sign, so
    what they bring in is masked off.
    """
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return bits ^ ((bits >> 16) & 0xFFFF)


def noise(like_n: Tensor, keys: Keys, first: int = 0) -> Tensor:
    """32 random bits for each element, int32; `first` is the number of the first, of any size."""
    wrapped = (first + 2**31) % 2**32 - 2**31
    index_n = torch.arange(like_n.numel(), dtype=torch.int32, device=like_n.device)
    return mix(mix((index_n.view(like_n.shape) + wrapped) ^ keys[0]) + keys[1])


def rounded(wide_n: Tensor, noise_n: Tensor) -> Tensor:
    """fp32 rounded to a neighbour in bf16, up or down, by 16 bits of `noise_n` (0 to 65,535).

    bf16 is fp32 without its lower 16 bits: the noise is added to them, and what carries over rounds
    up (away from zero, as the bits hold a magnitude). A NaN, which could carry into the sign and
    come out as zero, is left.
    """
    bits_n = (wide_n.view(torch.int32) + noise_n) & -(2**16)
    return torch.where(wide_n.isnan(), wide_n, bits_n.view(torch.float32)).to(torch.bfloat16)


def adamw_bf16_(
    p_n: Tensor,
    g_n: Tensor,
    m_n: Tensor,
    v_n: Tensor,
    factors: Sequence[float],
    keys: Keys,
    first: int = 0,
) -> None:
    """Update p, m and v in place.

    p: bf16, or fp32, which is not rounded; m, v: bf16; g: either. `factors` are those of
    `factors_of`, taken as fp32; `keys` and `first` as in `noise`.
    """
    noise_n = noise(p_n, keys, first)
    p_wide_n, m_wide_n, v_wide_n = _moved(p_n, g_n, m_n, v_n, factors)
    if p_n.dtype == torch.bfloat16:
        p_wide_n = rounded(p_wide_n, mix(noise_n) & 0xFFFF)
    p_n.copy_(p_wide_n)
    m_n.copy_(rounded(m_wide_n, noise_n & 0xFFFF))
    v_n.copy_(rounded(v_wide_n, (noise_n >> 16) & 0xFFFF))


def adamw_wide_(
    p_n: Tensor,
    g_n: Tensor,
    m_n: Tensor,
    v_n: Tensor,
    factors: Sequence[float],
    keys: Keys,
    shadow_n: Tensor | None = None,
    first: int = 0,
) -> None:
    """`adamw_bf16_` with m and v in fp32; p, bf16, is rounded as `round_to_` would.

    With `shadow_n`, fp32, that is updated, and p is it rounded to nearest: `keys` draw nothing.
    """
    old_n = p_n if shadow_n is None else shadow_n
    p_wide_n, m_wide_n, v_wide_n = _moved(old_n, g_n, m_n, v_n, factors)
    m_n.copy_(m_wide_n)
    v_n.copy_(v_wide_n)
    if shadow_n is None:
        round_to_(p_n, p_wide_n, keys, first)
    else:
        shadow_n.copy_(p_wide_n)
        p_n.copy_(p_wide_n)


def _moved(
    p_n: Tensor, g_n: Tensor, m_n: Tensor, v_n: Tensor, factors: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """p, m and v after an update, in fp32."""
    decay, rate, g_scale, new_m, new_v, v_scale, eps = factors
    g_n = g_n.float() * g_scale
    m_n = torch.lerp(m_n.float(), g_n, new_m)
    v_n = torch.lerp(v_n.float(), g_n * g_n, new_v)
    return p_n.float() * decay - rate * m_n / (v_n.sqrt() * v_scale + eps), m_n, v_n


def factors_of(
    step: int,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    gradient_scale: float,
    eps: float = 1e-8,
) -> list[float]:
    """What the updates above multiply with at `step`, from 1 (biases are corrected by it)."""
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


def round_to_(p_n: Tensor, wide_n: Tensor, keys: Keys, first: int = 0) -> None:
    """Set p, bf16, to `wide_n`, fp32, rounded stochastically; keys and first as in `noise`."""
    p_n.copy_(rounded(wide_n, noise(wide_n, keys, first) & 0xFFFF))


def update_bf16_(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, factors: Sequence[float], keys: Keys
) -> None:
    """`adamw_bf16_` on contiguous tensors of any size (g may lie otherwise)."""
    if p.is_cuda:
        from tunefork.kernels.adamw_triton import update_  # needs Triton, which comes with CUDA

        update_(p, g.contiguous(), m, v, factors, keys)
        return
    with torch.no_grad():
        for (p_n, g_n, m_n, v_n), first in _pieces(p, g, m, v):
            adamw_bf16_(p_n, g_n, m_n, v_n, factors, keys, first)


def update_wide_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    factors: Sequence[float],
    keys: Keys,
    shadow: Tensor | None = None,
) -> None:
    """`adamw_wide_` on contiguous tensors of any size (g may lie otherwise)."""
    if p.is_cuda:
        from tunefork.kernels.adamw_triton import update_wide_ as launch  # needs Triton, as above

        launch(p, g.contiguous(), m, v, factors, keys, shadow)
        return
    shadows = () if shadow is None else (shadow,)
    with torch.no_grad():
        for (p_n, g_n, m_n, v_n, *shadows_n), first in _pieces(p, g, m, v, *shadows):
            shadow_n = shadows_n[0] if shadows_n else None
            adamw_wide_(p_n, g_n, m_n, v_n, factors, keys, shadow_n, first)


def write_rounded_(p: Tensor, wide: Tensor, keys: Keys) -> None:
    """`round_to_` on contiguous tensors of any size."""
    if p.is_cuda:
        from tunefork.kernels.adamw_triton import round_to_ as launch  # needs Triton, as above

        launch(p, wide, keys)
        return
    with torch.no_grad():
        for (p_n, wide_n), first in _pieces(p, wide):
            round_to_(p_n, wide_n, keys, first)


def prepare(parameters: Iterable[Tensor], *, only_rounds: bool = False) -> None:
    """Compile what `update_bf16_`, or `write_rounded_`, of `parameters` launches on a GPU.

    Before the first step, whose time would otherwise be no measure of the others'. Raises
    ValueError for a weight whose elements do not lie in their order: it would not be updated.
    """
    for p in _forms(parameters):
        g = torch.zeros_like(p)
        m, v = (torch.zeros_like(p, dtype=torch.bfloat16) for _ in range(2))
        if only_rounds:
            write_rounded_(p, g.float(), (0, 0))
        else:
            update_bf16_(p, g, m, v, [1.0] * 7, (0, 0))


def prepare_wide(parameters: Iterable[Tensor], *, keeps_shadows: bool) -> None:
    """`prepare` for `update_wide_`."""
    for p in _forms(parameters):
        m, v, shadow = (torch.zeros_like(p, dtype=torch.float32) for _ in range(3))
        kept = shadow if keeps_shadows else None
        update_wide_(p, torch.zeros_like(p), m, v, [1.0] * 7, (0, 0), kept)


def _forms(parameters: Iterable[Tensor]) -> list[Tensor]:
    """A weight for each kernel of those on a GPU, compiled for a dtype, and for sizes that 16
    divides (loads are vectors) or not."""
    forms = set()
    for p in parameters:
        if not p.is_contiguous():
            shape, strides = tuple(p.shape), p.stride()
            raise ValueError(f"a weight of shape {shape} has strides {strides}: not contiguous")
        if p.is_cuda:
            forms.add((p.device, p.dtype, 16 + bool(p.numel() % 16)))
    return [torch.zeros(numel, dtype=dtype, device=device) for device, dtype, numel in forms]


def _pieces(*tensors: Tensor) -> Iterator[tuple[list[Tensor], int]]:
    """The same part of each tensor, and the number of the part's first element."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for first in range(0, flat[0].numel(), _PIECE):
        yield [tensor[first : first + _PIECE] for tensor in flat], first
