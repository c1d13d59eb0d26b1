"""bitsandbytes, imported in one place: NF4 with double quantisation, and 8-bit AdamW.

On a CPU with bf16 instructions its import warns that the package `kernels` is missing. That
package would fetch compiled code from a hub when imported, so it is never installed here, and the
one message about it is dropped.
"""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger("bitsandbytes.backends.cpu.ops")


def _is_wanted(record: logging.LogRecord) -> bool:
    return "kernels-community" not in str(record.msg)


_logger.addFilter(_is_wanted)
try:
    import bitsandbytes.functional
    from bitsandbytes.optim import AdamW8bit
finally:
    _logger.removeFilter(_is_wanted)

__all__ = [
    "BLOCK",
    "GROUP",
    "AdamW8bit",
    "dequantize_nf4",
    "dequantize_nf4_tensors",
    "nf4_maxima",
    "nf4_tensors",
    "nf4_values",
    "quantize_nf4",
]


BLOCK = 64
"""Consecutive values of a weight that share an absolute maximum."""
GROUP = 256
"""Consecutive maxima that share one of theirs."""


@cache
def _make_table() -> None:
    """bitsandbytes makes its table of 8-bit values once, on the device of whoever asks first: a
    table on the meta device would have no values for the next one."""
    quantize_nf4(torch.ones(64))


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Any]:
    """A weight's 4-bit codes, two a byte, and the state that dequantises them.

    Blocks of 64 share an absolute maximum, which is itself held in 8 bits in blocks of 256: about
    4.13 bits a parameter (QLoRA, section 3; https://arxiv.org/abs/2305.14314).
    """
    if weight.is_meta:
        _make_table()
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return codes, state


def dequantize_nf4(codes: Tensor, state: Any) -> Tensor:
    """The weight in the shape and dtype that it was quantised from."""
    rows, columns = state.shape
    return dequantize_nf4_tensors(nf4_tensors(codes, state), [rows], columns, state.dtype)


def nf4_tensors(codes: Tensor, state: Any) -> tuple[Tensor, ...]:
    """What `dequantize_nf4_tensors` needs of a weight from `quantize_nf4`, as plain tensors.

    torch.compile follows tensors into a compiled graph, not a state object.
    """
    second = state.state2
    return codes, state.absmax, second.absmax, second.code, state.offset.to(codes.device)


def nf4_maxima(tensors: Sequence[Tensor]) -> Tensor:
    """(N / 64,) fp32, what one weight's blocks are multiplied by; of its `nf4_tensors`."""
    _, absmax, absmax2, code, offset = tensors
    blockwise = torch.ops.bitsandbytes.dequantize_blockwise
    maxima: Tensor = blockwise(absmax, absmax2, code, GROUP, torch.float32) + offset
    return maxima


def nf4_values() -> Tensor:
    """(16,) fp32: what a code stands for, in units of its block's maximum. -1 and 1 are two."""
    values: Tensor = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    return values


def dequantize_nf4_tensors(
    tensors: Sequence[Tensor], sizes: Sequence[int], features_in: int, dtype: torch.dtype
) -> Tensor:
    """Weights (O_i, D) one below the other, from the `nf4_tensors` of each, one after the other."""
    ops, weights = torch.ops.bitsandbytes, []
    for index, size in enumerate(sizes):
        own = tensors[5 * index : 5 * index + 5]
        # As one row: blocks run on from row to row, which the CPU kernel of bitsandbytes 0.50 heeds
        # only where rows are multiples of a block.
        shape = (1, size * features_in)
        flat = ops.dequantize_4bit(own[0], nf4_maxima(own), BLOCK, "nf4", shape, dtype)
        weights.append(flat.view(size, features_in))
    return torch.cat(weights) if len(weights) > 1 else weights[0]
