"""`bank_stretches.py` on a CPU, by a kernel that reads each adapter once for all of its tokens.

Summed row by row, PyTorch's way, a table is read anew for each token, in pieces of 32 bytes. Here a
stretch of tokens is cut into blocks of up to eight, which share what is read: `bank_rows.c`, which
is compiled on the machine (`native.py`). Sums are in fp32, u is never rounded, y once.

Shape legend as in `bank_stretches.py`.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from tunefork.kernels import native

_MOST_TOKENS, _LEFT_OVER = 8, 4
"""Blocks are of so many tokens, and the rest of up to so many (`bank_rows.c`)."""
_DEFINITIONS = {torch.float32: ("NUMBER_FP32",), torch.bfloat16: ()}


class _Tables(ctypes.Structure):
    """What the kernel knows of matrices, field by field."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("features", ctypes.c_int64),
        ("layers", ctypes.c_int64),
        ("slot_pieces", ctypes.c_int64),
        ("sum_of_sizes", ctypes.c_int64),
        ("ends", ctypes.c_void_p),
    )


class Rows:
    """The kernel for A (N, C, D, E) and B (N, C, T, O), which stay where they are, of layers that
    `ends` (L,) int64 divides O into. They may be written to between calls."""

    def __init__(self, kernel: Callable[..., None], a: Tensor, b: Tensor, ends: Tensor) -> None:
        self._kernel, self._held = kernel, (a, b, ends)
        self.dtype, self.features, self.each = a.dtype, a.shape[2], a.shape[1] * a.shape[3]
        self._tables = _Tables(
            a.data_ptr(),
            b.data_ptr(),
            self.features,
            len(ends),
            a.shape[1],
            b.shape[3],
            ends.data_ptr(),
        )
        self._address = ctypes.addressof(self._tables)

    def add(self, y_so: Tensor, x_sd: Tensor, blocks: "Blocks") -> None:
        """y (S, O) += B_n A_n x (S, D) in place, in the tables' dtype; a row lies in one piece."""
        if not x_sd.dtype == y_so.dtype == self.dtype or y_so.stride(1) != 1:
            raise ValueError(f"x is {x_sd.dtype}, y {y_so.dtype}, strides {y_so.stride()}")
        if x_sd.stride(1) != 1:
            x_sd = x_sd.contiguous()
        tokens = len(x_sd)
        self._kernel(
            self._address,
            y_so.data_ptr(),
            y_so.stride(0),
            x_sd.data_ptr(),
            x_sd.stride(0),
            blocks.room(tokens * (self.each + self.features)),
            tokens,
            blocks.address,
            blocks.count,
        )


class Blocks:
    """A pass' stretches in pieces of few tokens, and room that a call needs."""

    def __init__(self, stretches: Sequence[tuple[int, int, int]], pieces: Sequence[int]) -> None:
        self.blocks_b4 = blocks_of(stretches, pieces)
        self.address, self.count = self.blocks_b4.data_ptr(), len(self.blocks_b4)
        self._room = torch.empty(0)

    def room(self, numbers: int) -> int:
        """Where there is room for so many in fp32. One call at a time has it."""
        if self._room.numel() < numbers:
            self._room = torch.empty(numbers)
        return self._room.data_ptr()


def blocks_of(stretches: Sequence[tuple[int, int, int]], pieces: Sequence[int]) -> Tensor:
    """(blocks, 4) int64: slot, first token, tokens and pieces of each, of stretches that are slot,
    first token and last (exclusive)."""
    found = []
    for (slot, first, last), count in zip(stretches, pieces, strict=True):
        at = first
        while at < last:
            left = last - at
            tokens = _MOST_TOKENS if left >= _MOST_TOKENS else min(left, _LEFT_OVER)
            found.append((slot, at, tokens, count))
            at += tokens
    return torch.tensor(found, dtype=torch.int64).view(-1, 4)


@cache
def _kernel(dtype: torch.dtype) -> Callable[..., None] | None:
    definitions = _DEFINITIONS.get(dtype)
    library = None if definitions is None else native.library("bank_rows", *definitions)
    if library is None:
        return None
    address, number = ctypes.c_void_p, ctypes.c_int64
    function = library.add_rows
    function.argtypes = (
        *(address, address, number, address, number),
        *(address, number, address, number),
    )
    function.restype = None
    found: Callable[..., None] = function
    return found


def rows_of(a: Tensor, b: Tensor, ends: Tensor) -> Rows | None:
    """The kernel for tables of bf16 or fp32 on a CPU, compiled now if it is the first time on this
    machine; else None."""
    kernel = _kernel(a.dtype) if a.device.type == "cpu" else None
    return None if kernel is None else Rows(kernel, a, b, ends)
