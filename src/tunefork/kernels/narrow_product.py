"""`narrow_product.cu`: which of its forms there are, and which width of tiles a product takes."""

import logging
from functools import cache
from pathlib import Path

import torch

from tunefork.kernels.cuda_source import CudaKernel, CudaSourceError

HOPPER = (9, 0)
"""Compute capability of the GPUs that it is for."""
ROWS, PART, ROW_BYTES = 128, 64, 128
"""Of a block's tile; columns of y that leave shared memory at a time; bytes of a tile's row."""
WIDTHS = _WIDE, _SLIM = 256, 128
"""Columns of a cluster's tile."""
_SHARED_BYTES = 224 * 1024
"""4 stages of 48 KiB or 6 of 32, and 32 for y."""
_THREADS = 384
_SLIM_COST = 1.15
"""How much longer a slim tile takes than half a wide one: each reads as much of a. Guessed."""


@cache
def kernel(index: int, definitions: tuple[str, ...], columns: int) -> CudaKernel | None:
    """On a GPU, for tiles of so many columns; None where there is none."""
    device = torch.device("cuda", index)
    if torch.cuda.get_device_capability(device) != HOPPER:
        return None
    defined = (*definitions, f"COLUMNS {columns}")
    text = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
    source = "".join(f"#define {name}\n" for name in defined) + text
    name = "bf16_product" if "BF16" in definitions else "int8_product"
    try:
        return CudaKernel(source, name, device, threads=_THREADS, shared_bytes=_SHARED_BYTES)
    except CudaSourceError as error:
        logging.getLogger(__name__).warning(
            "narrow_product.cu is not used, but what is slower: %s", error
        )
        return None


def columns_for(rows: int, columns: int, device: torch.device) -> int:
    """Of a cluster's tile, for y (rows, columns): slim where wide ones leave processors idle."""
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return columns_on(rows, columns, processors)


def columns_on(rows: int, columns: int, processors: int) -> int:
    """`columns_for` on a GPU of so many multiprocessors."""
    clusters, down = processors // 2, -(-rows // (2 * ROWS))
    wide, slim = (-(-down * -(-columns // width) // clusters) for width in (_WIDE, _SLIM))
    return _SLIM if slim * _SLIM_COST < 2 * wide else _WIDE
