"""Products in bf16 with narrow ones inside, rounded once, by a kernel of our own on Hopper.

y = a b^T + u v^T, and for a layer's input gradient a b + u v of several a side by side:
`narrow_product.cu`, with bf16 where `int8_product.py` has codes. cuBLAS rounds a product to bf16
before it adds it to a matrix: of a delta that is small beside it, which LoRA's are at first, most
is lost so (benchmarks/rounded_once.py), and the matrix is read and written once more. Few tokens,
and GPUs that the kernel is not for, have cuBLAS's products in forms that are rounded once too
(`_by_cublas`). The definition is here, and runs elsewhere.

Shape legend: M rows of the result, N its columns, K features (of all parts), P of the narrow ones.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tunefork.kernels.compiled import is_on_gpu
from tunefork.kernels.cuda_source import CudaSourceError
from tunefork.kernels.narrow_product import HOPPER, PART, ROWS, WIDTHS, columns_for, kernel

_TILE = 64
"""Columns of a tile of K; what parts' sizes are multiples of where there are several."""
_MOST_PARTS = 3
_LEAST_ROWS = 512
"""For the kernel, whose tiles are 256 rows: with fewer half of a GPU's processors have none. By
count: of 4096 by 4096 it takes 26 us from here on, sums by cuBLAS 30."""
_AT_A_TIME, _LEAST_AT_A_TIME = 2**25, 1024
"""Numbers that are in memory at one time without the kernel, of y's sums (128 MiB, and a product's
beside them) or of operands side by side (64 MiB), and rows at least."""
_CHECKED = ((1100, 272, (64, 128, 192), 24), (1280, 512, (592,), 0), (2304, 2560, (128,), 16))
"""M, N, each K_i and P; at least as many rows as the kernel asks for. Of the last one clusters have
more than one tile."""
_TOLERANCE = 0.004
"""Of y's error, relative to all of it; bf16's rounding alone is 0.0017."""


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


def check_kernel(device: torch.device) -> None:
    """Build the kernel's forms for `device`, a GPU, and have them multiply something.

    Raises CudaSourceError where one gives other results than the definition.
    """
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).bfloat16().to(device)

    for m, n, sizes, p in _CHECKED:
        parts, b, u, v = [normal(m, k) for k in sizes], normal(n, sum(sizes)), None, None
        if p:
            u, v = normal(m, p), normal(n, p)
        wanted = bf16_product_reference(parts, b, u, v, is_turned=False).float()
        b_kn, v_pn = b.t().contiguous(), None if v is None else v.t().contiguous()
        for columns in WIDTHS:
            plain = _product(parts, b, u, v, False, columns)
            turned = _product(parts, b_kn, u, v_pn, True, columns)
            for found in (plain, turned):
                if not (found.float() - wanted).norm() <= _TOLERANCE * wanted.norm():
                    raise CudaSourceError(f"the bf16 product of ({m}, {sizes}) by {n} is wrong")


@torch.library.custom_op("tunefork::bf16_product", mutates_args=(), device_types="cuda")
def _bf16_product(
    parts: Sequence[Tensor], b: Tensor, u: Tensor | None, v: Tensor | None, is_turned: bool
) -> Tensor:
    return _product(parts, b, u, v, is_turned)


def _product(
    parts: Sequence[Tensor],
    b: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    is_turned: bool,
    columns: int | None = None,
) -> Tensor:
    """`bf16_product` on a GPU; `columns`, of the kernel's tiles: those that suit y."""
    y = _empty(parts, b, is_turned)
    if not y.numel():
        return y
    narrow = () if u is None or v is None else (u, v)
    # Asked in here, where it is no question of torch.compile's: one form serves all lengths.
    if not _takes([*parts, b, *narrow, y]):
        return _by_cublas(parts, b, narrow, is_turned)
    is_even = all(part.shape[1] % _TILE == 0 for part in parts)
    if len(parts) > _MOST_PARTS or (len(parts) > 1 and not is_even):
        parts = [torch.cat(list(parts), dim=1)]
    with torch.cuda.device(b.device):
        columns = columns or columns_for(y.shape[0], y.shape[1], b.device)
        found = kernel(b.device.index, ("BF16", "TURNED") if is_turned else ("BF16",), columns)
        if found is None:
            return _by_cublas(parts, b, narrow, is_turned)
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


def _by_cublas(
    parts: Sequence[Tensor], b: Tensor, narrow: Sequence[Tensor], is_turned: bool
) -> Tensor:
    """The same without the kernel, rounded once too."""
    columns, y_mn = [*parts, *narrow[:1]], _empty(parts, b, is_turned)
    m, n, k = *y_mn.shape, sum(column.shape[1] for column in columns)
    if len(columns) == 1:
        torch.mm(columns[0], b if is_turned else b.t(), out=y_mn)
    elif _copying_is_less(m, n, k, len(columns)):
        _by_copies(columns, [b, *narrow[1:]], is_turned, y_mn)
    else:
        factors = torch.split(b, [part.shape[1] for part in parts], dim=0 if is_turned else 1)
        _by_sums(columns, [*factors, *narrow[1:]], is_turned, y_mn)
    return y_mn


def _copying_is_less(m: int, n: int, k: int, count: int) -> bool:
    """Whether operands side by side, of K features in all, move fewer bytes than y's sums of
    `count` products do: it is so with many rows, and with few the weight's copy is more than y.

    Copied, numbers of both are read and written, 4 bytes. A sum is written in 4 bytes; each other
    product is written, both are read and the sum written, 16; in the end it is read, 4.
    """
    return 4 * (m + n) * k < (16 * count - 8) * m * n


def _by_copies(
    columns: Sequence[Tensor], factors: Sequence[Tensor], is_turned: bool, y_mn: Tensor
) -> None:
    """Fill `y` by one product of all columns side by side. Beside y there is the whole weight once
    more, but the columns of some rows only."""
    dim = 0 if is_turned else 1
    whole = torch.cat(list(factors), dim=dim) if len(factors) > 1 else factors[0]
    for rows in _some_rows(len(y_mn), whole.shape[dim]):
        side_by_side = torch.cat([column[rows] for column in columns], dim=1)
        torch.mm(side_by_side, whole if is_turned else whole.t(), out=y_mn[rows])


def _by_sums(
    columns: Sequence[Tensor], factors: Sequence[Tensor], is_turned: bool, y_mn: Tensor
) -> None:
    """Fill `y` by a product each, some rows at a time: all sums in fp32 take four times y's
    room."""
    factors = [factor if is_turned else factor.t() for factor in factors]
    for rows in _some_rows(len(y_mn), y_mn.shape[1]):
        sums = torch.mm(columns[0][rows], factors[0], out_dtype=torch.float32)
        for column, factor in zip(columns[1:], factors[1:], strict=True):
            sums += torch.mm(column[rows], factor, out_dtype=torch.float32)
        y_mn[rows] = sums


def _some_rows(count: int, width: int) -> Iterator[slice]:
    """Those of `count` whose `width` numbers are in memory at one time."""
    height = max(_LEAST_AT_A_TIME, _AT_A_TIME // width)
    return (slice(first, first + height) for first in range(0, count, height))


@_bf16_product.register_fake
def _(
    parts: Sequence[Tensor], b: Tensor, u: Tensor | None, v: Tensor | None, is_turned: bool
) -> Tensor:
    return _empty(parts, b, is_turned)


def _empty(parts: Sequence[Tensor], b: Tensor, is_turned: bool) -> Tensor:
    return b.new_empty(parts[0].shape[0], b.shape[1 if is_turned else 0])
