"""What operators cost that more is known of than their tensors: products, attention, our own.

By what they are, not by where they come: `trace.py` counts those of a run on the meta device,
`graph.py` those of a captured graph.
"""

from collections.abc import Sequence
from typing import Any

import torch

import tunefork.kernels.cross_entropy  # registers to_gradient_
import tunefork.kernels.gated  # registers gated_gradients, gated_gradients_and_maxima
import tunefork.kernels.int8_gradients  # registers int8_gradient_codes
import tunefork.kernels.int8_product  # registers int8_product
import tunefork.kernels.int8_rows  # registers round_apart
import tunefork.kernels.lora_group  # registers bf16_product, lora_gradients
import tunefork.kernels.nf4_int8  # noqa: F401  registers nf4_int8, nf4_int8_turned

_SKINNY = 64
"""A product with a side up to this is bound by memory: LoRA's down and up projections."""

PRODUCTS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.mm.out: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.addmm_.default: 1,
    torch.ops.aten.baddbmm.default: 1,
}
"""Matrix products -> where their left operand stands; the right one follows it."""
BF16_PRODUCT = torch.ops.tunefork.bf16_product.default
"""One with a narrow one inside."""
INT8_PRODUCT = torch.ops.tunefork.int8_product.default
"""One of int8 codes, the right ones as they lie, with a narrow one in bf16 inside or without."""
LORA_GRADIENTS = {
    torch.ops.tunefork.lora_gradients.default: 0,
    torch.ops.tunefork.int8_gradient_codes.default: 3,
}
"""Two skinny products with each of several tensors, read once, by two kernels each -> what kernels
there are beside these. What the first leaves for the second (`kernels/lora_gradients_triton.py`)
makes no moment higher: it is gone before the input's gradient comes, which is larger (up to O = 16
D at rank 16, 4 D at 32), or, of an MLP's gate and up, comes after what was larger: their gradients
beside what these are made of."""
WRITTEN_OVER = {
    torch.ops.tunefork.to_gradient_.default: 0,
    torch.ops.tunefork.gated_gradients.default: 2,
    torch.ops.tunefork.gated_gradients_and_maxima.default: 2,
}
"""Bound by memory, over one of what they read they write a result -> where that stands."""
READ_TWICE = {torch.ops.tunefork.round_apart.default: 0}
"""Bound by memory, one of what they read is read by two kernels -> where that stands."""
_KERNELS = {torch.ops.tunefork.round_apart.default: 3}
"""Bound by memory, and several kernels: the two that read x, and what clears the magnitudes."""
_OF_NF4 = {torch.ops.tunefork.nf4_int8.default, torch.ops.tunefork.nf4_int8_turned.default}
"""Bound by memory, a kernel for each layer, of which they are given five tensors."""
FLASH = {
    torch.ops.aten._flash_attention_forward.default: 1.0,
    torch.ops.aten._flash_attention_backward.default: 2.5,
}
"""FlashAttention over segments -> its operations, in units of a forward pass's."""
_FLASH_BLOCK = 128
"""Tokens by which its backward pass's fp32 sums are longer, a segment."""


def product(left: Sequence[int], right: Sequence[int]) -> tuple[str, float]:
    """Kind and operations of a matrix product of these shapes, batched where they have three."""
    rows, inner, columns = left[-2], left[-1], right[-1]
    batch = left[0] if len(left) == 3 else 1
    kind = "skinny" if min(rows, inner, columns) <= _SKINNY else "gemm"
    return kind, 2.0 * batch * rows * inner * columns


def int8_product(
    left: Sequence[int], right: Sequence[int], narrow: Sequence[int] | None
) -> tuple[str, float]:
    """Kind and operations of `INT8_PRODUCT`, of the shapes (M, K), (N, K) and (M, P).

    In int8's: of the narrow product in bf16, which takes the same tensor cores twice as long, there
    are two each.
    """
    kind, flops = product(left, right[::-1])
    if narrow is not None:
        flops += 2 * product(narrow, (narrow[1], right[0]))[1]
    return "gemm_int8" if kind == "gemm" else kind, flops


def kernels_of(func: Any, args: Sequence[Any]) -> int:
    """How many an operator is that is bound by memory."""
    return len(args[0]) // 5 if func in _OF_NF4 else _KERNELS.get(func, 1)


def lora_gradients_flops(dys: Sequence[Sequence[int]], lora_b: Sequence[Sequence[int]]) -> float:
    """Operations of `LORA_GRADIENTS`, of its arguments' shapes (S, O_i) and (O_i, R_i)."""
    pairs = zip(dys, lora_b, strict=True)
    return sum(2 * product(dy, b)[1] for dy, b in pairs)


def bf16_product(
    part: Sequence[int], right: Sequence[int], narrow: Sequence[int] | None, is_turned: bool
) -> tuple[str, float]:
    """Kind and operations of `BF16_PRODUCT`, of the shapes (M, K_i), (K, N) where it is turned,
    else (N, K), and (M, P)."""
    inner, columns = right if is_turned else right[::-1]
    kind, flops = product((part[0], inner), (inner, columns))
    return kind, flops + (0 if narrow is None else product(narrow, (narrow[1], columns))[1])


def flash_flops(query: Sequence[int], squares: float) -> float:
    """Of causal attention's forward pass; queries are (tokens, heads, features)."""
    return 2.0 * query[1] * query[2] * squares


def flash_room(query: Sequence[int], keys: Sequence[int], segments: int) -> int:
    """Bytes that flash attention's backward pass takes beside its results: fp32 sums of the
    queries' gradient, a number a query, and where heads share keys the gradients of each head's."""
    tokens, heads, features = query
    sums = 4 * heads * features * (tokens + _FLASH_BLOCK * segments) + 4 * heads * tokens
    return sums + (4 * tokens * heads * features if keys[1] < heads else 0)
