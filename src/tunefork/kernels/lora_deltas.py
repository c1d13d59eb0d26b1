"""The deltas of LoRA layers with one input, written where the base's product is then added to them.

The other order, a delta added to the product, reads and writes all of the product once more: 86 GB
in a step of 16,384 tokens of an 8B model, its input gradients included. Written first it costs half
of that, and the product reads it while it computes. Both orders give the same bits on a GPU.

A product of so narrow operands is bound by what it writes, and cuBLAS's tiles are cut for others:
there `kernels/lora_deltas_triton.py` writes it, at the rate of a copy.

Shape legend: S tokens, O_i features out of a layer, O their sum, R_i its rank, R their sum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_RANK = 64
"""Of a layer, for the kernel: what it holds of u and B grows with the rank, and with it goes what
it is faster by."""


def lora_deltas(u_sr: Tensor, lora_b: Sequence[Tensor], scale: float) -> Tensor:
    """[scale * u_i B_i^T], (S, O): of each layer the product of its columns of u with its B.

    u (S, R) and B_i (O_i, R_i) have one dtype, and so has the result. A layer without a delta has
    R_i 0, and zeros. Summed in fp32 for bf16, rounded once.
    """
    found: Tensor = torch.ops.tunefork.lora_deltas(u_sr, list(lora_b), scale)
    return found


# An operator: torch.compile would make a kernel for each layer and one that puts them together.
@torch.library.custom_op("tunefork::lora_deltas", mutates_args=())
def _lora_deltas(u: Tensor, lora_b: Sequence[Tensor], scale: float) -> Tensor:
    y_so, row, column = _empty(u, lora_b), 0, 0
    for b_or in lora_b:
        size, rank = b_or.shape
        y, own = y_so[:, row : row + size], u[:, column : column + rank]
        row, column = row + size, column + rank
        if rank == 0:
            y.zero_()
        elif _takes(own):
            # Needs Triton, which comes with CUDA.
            from tunefork.kernels.lora_deltas_triton import write

            write(y, own, b_or, scale)
        else:
            torch.addmm(y, own, b_or.t(), beta=0, alpha=scale, out=y)
    return y_so


@_lora_deltas.register_fake
def _(u: Tensor, lora_b: Sequence[Tensor], scale: float) -> Tensor:
    return _empty(u, lora_b)


def _takes(u_sr: Tensor) -> bool:
    """Whether the kernel does: rows in one piece, of few values."""
    is_narrow = u_sr.is_cuda and u_sr.dtype == torch.bfloat16
    return is_narrow and u_sr.shape[1] <= LARGEST_RANK and u_sr.stride(1) == 1


def _empty(u: Tensor, lora_b: Sequence[Tensor]) -> Tensor:
    return u.new_empty(u.shape[0], sum(b.shape[0] for b in lora_b))
