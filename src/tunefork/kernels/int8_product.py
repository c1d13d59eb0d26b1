"""Products of int8 codes with narrow bf16 products inside, by kernels of our own.

y = (a * scale_m) (b * scale_n)^T + u v^T: the codes of activations and of a frozen weight, and
beside them what LoRA's delta and the directions apart are products of. Added afterwards, that would
read and write y once more, which for 8B-sized layers costs a quarter of the product itself.
PyTorch's int8 product gives int32, half as fast; a kernel has the sums of both in the same
registers. On Hopper that is `narrow_product.cu`, 6 % slower than cuBLAS's e4m3 with columns of
codes for the narrow ones (benchmarks/h200_products.py), on other GPUs with int8 tensor cores, and
where the first is not to be had, `int8_product_triton.py`. The definition is here, and runs
elsewhere.

Shape legend: M rows of the result, N its columns, K features of the codes, P of the narrow ones.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from tunefork.kernels.compiled import is_on_gpu
from tunefork.kernels.cuda_source import CudaKernel, CudaSourceError
from tunefork.kernels.narrow_product import (
    PART,
    ROW_BYTES,
    ROWS,
    WIDTHS,
    columns_for,
    kernel,
)

STEP, NARROW_STEP = 16, 8
"""What K and N are multiples of, and P: rows start at multiples of 16 bytes."""
MOST_SUMMED = 2**31 // 127**2
"""K at most: int32 holds any such sum."""
_CHECKED = ((77, 144, 592, 16), (256, 256, 128, 0), (300, 624, 1024, 72), (2304, 2560, 128, 16))
"""M, N, K and P. Of the last one clusters have more than one tile."""
_TOLERANCE = 0.004
"""Of y's error, relative to all of it; bf16's rounding alone is 0.0017."""


def int8_product(
    a_mk: Tensor,
    b_nk: Tensor,
    scale_m1: Tensor,
    scale_1n: Tensor | None,
    u_mp: Tensor | None,
    v_np: Tensor | None,
) -> Tensor:
    """(a * scale_m) (b * scale_n)^T + u v^T, (M, N) in bf16.

    a (M, K) and b (N, K) are int8, the scales fp32 (None: ones), u (M, P) and v (N, P) bf16, or
    both None. K and N are multiples of `STEP`, P of `NARROW_STEP`, and K is `MOST_SUMMED` at most.
    """
    if is_on_gpu(a_mk):
        return torch.ops.tunefork.int8_product(a_mk, b_nk, scale_m1, scale_1n, u_mp, v_np)  # type: ignore[no-any-return]
    return int8_product_reference(a_mk, b_nk, scale_m1, scale_1n, u_mp, v_np)


def int8_product_reference(
    a_mk: Tensor,
    b_nk: Tensor,
    scale_m1: Tensor,
    scale_1n: Tensor | None,
    u_mp: Tensor | None,
    v_np: Tensor | None,
) -> Tensor:
    """The definition of `int8_product`, but that codes are summed in fp32, whose 24 bits a sum over
    more than 1,040 products may exceed: it is then rounded."""
    y_mn = (a_mk.float() @ b_nk.float().t()) * scale_m1
    if scale_1n is not None:
        y_mn = y_mn * scale_1n
    if u_mp is not None and v_np is not None:
        y_mn = y_mn + u_mp.float() @ v_np.float().t()
    return y_mn.bfloat16()


def check_kernel(device: torch.device) -> None:
    """Build the kernel for `device`, a GPU, and have it multiply something.

    Raises CudaSourceError where it gives other results than the definition.
    """
    made = torch.Generator().manual_seed(0)

    def codes(rows: int, columns: int) -> Tensor:
        found = torch.randint(-127, 128, (rows, columns), generator=made, dtype=torch.int8)
        return found.to(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).to(device)

    for m, n, k, p in _CHECKED:
        u, v = (normal(rows, p).bfloat16() if p else None for rows in (m, n))
        scale_m, scale_n = normal(m, 1).abs() / k**0.5 / 5000, normal(1, n).abs() if p else None
        a, b = codes(m, k), codes(n, k)
        wanted = int8_product_reference(a, b, scale_m, scale_n, u, v).float()
        for columns in WIDTHS:
            found = _product(a, b, scale_m, scale_n, u, v, columns).float()
            if not (found - wanted).norm() <= _TOLERANCE * wanted.norm():
                raise CudaSourceError(f"the int8 product of ({m}, {k}) by ({n}, {k}) is wrong")


def launch(
    kernel: CudaKernel,
    columns: int,
    operands: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor | None],
    narrow: tuple[Tensor, Tensor] | None,
    y_mn: Tensor,
) -> None:
    """Fill `y`, on the current device; all is contiguous. `columns` are those of tiles."""
    is_narrow, (u_mp, v_np) = narrow is not None, narrow or operands
    box = 64 if is_narrow else ROW_BYTES  # unread where there are none
    rows = (ROWS, columns // 2)  # of a's tile, and of the half of b's that a block copies
    maps = [
        *(kernel.map(codes, ROW_BYTES, n) for codes, n in zip(operands, rows, strict=True)),
        *(kernel.map(each, box, n) for each, n in zip((u_mp, v_np), rows, strict=True)),
        kernel.map(y_mn, PART, PART),
    ]
    k_tiles = -(-operands[0].shape[1] // ROW_BYTES)
    counts = *y_mn.shape, k_tiles, -(-u_mp.shape[1] // 16) if is_narrow else 0
    addresses = (None if scale is None else scale.data_ptr() for scale in scales)
    arguments: list[Any] = [*maps, *map(ctypes.c_void_p, addresses), *map(ctypes.c_int, counts)]
    kernel.launch(kernel.processors // 2 * 2, arguments)  # two are a cluster


@torch.library.custom_op("tunefork::int8_product", mutates_args=(), device_types="cuda")
def _int8_product(
    a: Tensor,
    b: Tensor,
    scale_m: Tensor,
    scale_n: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
) -> Tensor:
    return _product(a, b, scale_m, scale_n, u, v)


def _product(
    a: Tensor,
    b: Tensor,
    scale_m: Tensor,
    scale_n: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
    columns: int | None = None,
) -> Tensor:
    """`int8_product` on a GPU; `columns`, of the CUDA kernel's tiles: those that suit y."""
    y = a.new_empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)
    if not y.numel():
        return y
    narrow = None if u is None or v is None else (u.contiguous(), v.contiguous())
    scales = scale_m.contiguous(), None if scale_n is None else scale_n.contiguous()
    operands = a.contiguous(), b.contiguous()
    with torch.cuda.device(a.device):
        columns = columns or columns_for(len(a), len(b), a.device)
        found = kernel(a.device.index, (), columns)
        if found is not None:
            launch(found, columns, operands, scales, narrow, y)
        else:
            from tunefork.kernels import int8_product_triton  # Triton comes with CUDA

            int8_product_triton.launch(operands, scales, narrow, y)
    return y


@_int8_product.register_fake
def _(
    a: Tensor,
    b: Tensor,
    scale_m: Tensor,
    scale_n: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)
