"""`bank_stretches.py` on a CPU, by a kernel that reads an adapter once for up to eight tokens.

Summed row by row, PyTorch's way, a table is read anew for each token, in pieces of 32 bytes. Here a
stretch of tokens is cut into blocks of up to eight, which share what is read: `bank_rows.c`, which
is compiled on the machine (`native.py`), if that has AVX-512. Sums are in fp32, u is never rounded,
y once. Many tokens side by side are for a library's products.

Shape legend as in `bank_stretches.py`.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tunefork.kernels import native

_MOST_TOKENS, _LEFT_OVER = 8, 4
"""Blocks are of so many tokens, and the rest of up to so many (`bank_rows.c`)."""
_MOST_NUMBERS = {torch.bfloat16: 500_000, torch.float32: 1 << 62}
"""Of x and y of one adapter. From there on two products are quicker, in bf16: with 576 to 3,072
features from 170 tokens on, with 4,096 to 6,144 from 60 (an EPYC with AVX-512, 2 threads)."""
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


_ADDRESS, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (
    *(_ADDRESS, _ADDRESS, _NUMBER, _ADDRESS, _NUMBER),
    *(_ADDRESS, _NUMBER, _ADDRESS, _NUMBER, ctypes.c_int),
)


class Blocks:
    """Stretches (slot, first token, last token (exclusive)) in pieces of few tokens, each with how
    many pieces of a rank its adapter has."""

    def __init__(self, stretches: Sequence[tuple[int, int, int]], pieces: Sequence[int]) -> None:
        found = []
        for (slot, first, last), count in zip(stretches, pieces, strict=True):
            at = first
            while at < last:
                left = last - at
                tokens = _MOST_TOKENS if left >= _MOST_TOKENS else min(left, _LEFT_OVER)
                found.append((slot, at, tokens, count))
                at += tokens
        self.blocks_b4 = torch.tensor(found, dtype=torch.int64).view(-1, 4)
        """Slot, first token, tokens and pieces."""
        every = (*stretches, (0, 0, 0))
        self.least = min(min(slot, first) for slot, first, _ in every)
        self.slots, self.tokens = max(slot for slot, *_ in every) + 1, max(one[2] for one in every)
        self.pieces = max(pieces, default=0)


class Rows:
    """The kernel for A (N, C, D, E) and B (N, C, T, O), which stay where they are, of layers that
    `ends` (L,) int64 divides O into. They may be written to between calls."""

    def __init__(self, kernel: Callable[..., None], a: Tensor, b: Tensor, ends: Tensor) -> None:
        self._kernel, self._held = kernel, (a, b, ends)
        self.dtype, self.num_slots, self.pieces, self.features = a.dtype, *a.shape[:3]
        self.each, self.features_out = a.shape[1] * a.shape[3], b.shape[3]
        self.longest = _MOST_NUMBERS[a.dtype] // (self.features + self.features_out)
        """Tokens of one adapter side by side for which it is the quicker way."""
        self._tables = _Tables(
            a.data_ptr(),
            b.data_ptr(),
            self.features,
            len(ends),
            self.pieces,
            self.features_out,
            ends.data_ptr(),
        )
        self._address = ctypes.addressof(self._tables)

    def __reduce__(self) -> Any:
        """A copy has addresses of its own."""
        return rows_of, self._held

    def add(self, y_so: Tensor, x_sd: Tensor, blocks: Blocks) -> None:
        """y (S, O) += B_n A_n x (S, D) in place, in the tables' dtype; a row of y lies in one
        piece. Without a gradient. Raises ValueError for what is not of the tables' shape."""
        (tokens, features), (stride_y, is_near) = x_sd.shape, y_so.stride()
        if (
            features != self.features
            or y_so.shape != (tokens, self.features_out)
            or not x_sd.dtype is y_so.dtype is self.dtype
            or not (x_sd.is_cpu and y_so.is_cpu and is_near == 1)
        ):
            raise ValueError(
                f"x {tuple(x_sd.shape)} {x_sd.dtype} and y {tuple(y_so.shape)} {y_so.dtype}, "
                f"strides {y_so.stride()}, for tables of {self.features} to {self.features_out}"
            )
        is_within = blocks.slots <= self.num_slots and blocks.pieces <= self.pieces
        if not is_within or blocks.tokens > tokens or blocks.least < 0:
            raise ValueError(f"stretches go beyond {tokens} tokens, or slots, or a slot's rank")
        stride_x, is_near = x_sd.stride()
        if is_near != 1:
            x_sd, stride_x = x_sd.contiguous(), features
        threads = torch.get_num_threads()
        room = torch.empty(tokens * self.each + threads * _MOST_TOKENS * features)
        self._kernel(
            self._address,
            y_so.data_ptr(),
            stride_y,
            x_sd.data_ptr(),
            stride_x,
            room.data_ptr(),
            tokens,
            blocks.blocks_b4.data_ptr(),
            len(blocks.blocks_b4),
            threads,
        )


@cache
def _kernel(dtype: torch.dtype) -> Callable[..., None] | None:
    if dtype not in _DEFINITIONS:
        return None
    return native.function("bank_rows", "add_rows", _ARGUMENTS, _DEFINITIONS[dtype])


def rows_of(a: Tensor, b: Tensor, ends: Tensor) -> Rows | None:
    """The kernel for tables of bf16 or fp32 on a CPU, compiled now if it is the first time on this
    machine; else None."""
    kernel = _kernel(a.dtype) if a.device.type == "cpu" else None
    return None if kernel is None else Rows(kernel, a, b, ends)
