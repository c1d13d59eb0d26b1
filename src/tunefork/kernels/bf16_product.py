"""Products in bf16 with narrow ones inside, rounded once, by a kernel of our own on Hopper.

y = a b^T + u v^T, and for a layer's input gradient a b + u v of several a side by side:
`narrow_product.cu`, with bf16 where `int8_product.py` has codes. cuBLAS rounds a product to bf16
before it adds it to a matrix: of a delta that is small beside it, which LoRA's are at first, most
is lost so (benchmarks/rounded_once.py), and the matrix is read and written once more. The
definition is here, and runs elsewhere but for few tokens, and GPUs that the kernel is not for: they
sum in fp32 what they multiply in bf16.

Shape legend: M rows of the result, N its columns, K features (of all parts), P of the narrow ones.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tunefork.kernels.compiled import is_on_gpu
from tunefork.kernels.narrow_product import HOPPER, PART, ROWS, columns_for, kernel

_TILE = 64
"""Columns of a tile of K; what parts' sizes are multiples of where there are several."""
_MOST_PARTS = 3
_LEAST_ROWS = 1024
"""For the kernel, whose tiles are 256 rows: with fewer its blocks are too few. Not measured."""
_SUMMED_AT_A_TIME, _LEAST_SUMMED_ROWS = 2**25, 1024
"""Numbers of y whose sums are in memory at one time without the kernel (128 MiB, and a product's
beside them), and rows at least."""


def bf16_product(
    parts: Sequence[Tensor], b: Tensor, u_mp: Tensor | None, v: Tensor | None, *, is_turned: bool
) -> Tensor:
    """(M, N): a b^T + u v^T of b (N, K) and v (N, P); turned, a b + u v of b (K, N) and v (P, N).

    a is `parts` (M, K_i) side by side; u and v may both be None. All are of one dtype, and summed
    in fp32 at least; the kernel takes K_i, N and P that are multiples of 8.
    """
    if is_on_gpu(b) and b.dtype == torch.bfloat16:
        return torch.ops.tunefork.bf16_product(list(parts), b, u_mp, v, is_turned)  # type: ignore[no-any-return]
    return bf16_product_reference(parts, b, u_mp, v, is_turned=is_turned)


def bf16_product_reference(
    parts: Sequence[Tensor], b: Tensor, u_mp: Tensor | None, v: Tensor | None, *, is_turned: bool
) -> Tensor:
    """The definition of `bf16_product`, of any dtype."""
    pairs = [(torch.cat(list(parts), dim=1), b)]
    if u_mp is not None and v is not None:
        pairs.append((u_mp, v))
    wide = torch.promote_types(b.dtype, torch.float32)
    products = [x.to(wide) @ (w if is_turned else w.t()).to(wide) for x, w in pairs]
    return sum(products[1:], products[0]).to(b.dtype)


@torch.library.custom_op("tunefork::bf16_product", mutates_args=(), device_types="cuda")
def _bf16_product(
    parts: Sequence[Tensor], b: Tensor, u: Tensor | None, v: Tensor | None, is_turned: bool
) -> Tensor:
    y = _empty(parts, b, is_turned)
    if not y.numel():
        return y
    narrow = () if u is None or v is None else (u, v)
    # Asked in here, where it is no question of torch.compile's: one form serves all lengths.
    if not _takes([*parts, b, *narrow, y]):
        return _by_sums(parts, b, narrow, is_turned)
    is_even = all(part.shape[1] % _TILE == 0 for part in parts)
    if len(parts) > _MOST_PARTS or (len(parts) > 1 and not is_even):
        parts = [torch.cat(list(parts), dim=1)]
    with torch.cuda.device(b.device):
        columns = columns_for(y.shape[0], y.shape[1], b.device)
        found = kernel(b.device.index, ("BF16", "TURNED") if is_turned else ("BF16",), columns)
        if found is None:
            return _by_sums(parts, b, narrow, is_turned)
        *rows, b = (t if _is_in_order(t) else t.contiguous() for t in (*parts, b))
        # Without narrow ones their maps are not read.
        u, v = (t if _is_in_order(t) else t.contiguous() for t in narrow or (rows[0], b))
        box = (_TILE, _TILE) if is_turned else (_TILE, columns // 2)
        maps = [
            *(found.map(part, _TILE, ROWS) for part in (rows + rows[:1] * 2)[:_MOST_PARTS]),
            found.map(b, *box),
            found.map(u, _TILE, ROWS),
            found.map(v, *box),
            found.map(y, PART, PART),
        ]
        tiles = [-(-part.shape[1] // _TILE) for part in rows]
        second, third = tiles[0], sum(tiles[:2])
        counts = (*y.shape, second, third, sum(tiles), -(-u.shape[1] // 16) if narrow else 0)
        arguments: list[Any] = [*maps, *map(ctypes.c_int, counts)]
        found.launch(found.processors // 2 * 2, arguments)  # two are a cluster
    return y


def _takes(matrices: Sequence[Tensor]) -> bool:
    """Whether the kernel does: a Hopper GPU, many rows, addresses that its copies have."""
    in_order = [t for t in matrices if _is_in_order(t)]  # others are copied
    is_aligned = all(t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in in_order)
    is_aligned &= all(t.shape[1] % 8 == 0 for t in matrices)
    is_hopper = torch.cuda.get_device_capability(matrices[0].device) == HOPPER
    return is_hopper and is_aligned and len(matrices[0]) >= _LEAST_ROWS


def _is_in_order(matrix: Tensor) -> bool:
    """Whether its rows lie one after the other: those of a sum's gradient are one, expanded."""
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def _by_sums(
    parts: Sequence[Tensor], b: Tensor, narrow: Sequence[Tensor], is_turned: bool
) -> Tensor:
    """The same by cuBLAS, some rows at a time: all of y's sums in fp32 take four times its room."""
    factors = [*torch.split(b, [part.shape[1] for part in parts], dim=0 if is_turned else 1)]
    columns, factors = [*parts, *narrow[:1]], [*factors, *narrow[1:]]
    if not is_turned:
        factors = [factor.t() for factor in factors]
    if len(columns) == 1:
        return columns[0] @ factors[0]
    y_mn = _empty(parts, b, is_turned)
    height = max(_LEAST_SUMMED_ROWS, _SUMMED_AT_A_TIME // y_mn.shape[1])
    for first in range(0, y_mn.shape[0], height):
        rows = slice(first, first + height)
        sums = torch.mm(columns[0][rows], factors[0], out_dtype=torch.float32)
        for part, factor in zip(columns[1:], factors[1:], strict=True):
            sums += torch.mm(part[rows], factor, out_dtype=torch.float32)
        y_mn[rows] = sums
    return y_mn


@_bf16_product.register_fake
def _(
    parts: Sequence[Tensor], b: Tensor, u: Tensor | None, v: Tensor | None, is_turned: bool
) -> Tensor:
    return _empty(parts, b, is_turned)


def _empty(parts: Sequence[Tensor], b: Tensor, is_turned: bool) -> Tensor:
    return b.new_empty(parts[0].shape[0], b.shape[1 if is_turned else 0])
