"""Host memory to a GPU, by way of a piece of pinned memory that is there from the start.

A GPU copies from pinned memory by itself, while others go on. But pinning takes long (some 0.1 s
for an adapter of an 8B model), and nobody launches anything meanwhile. So adapters lie in ordinary
memory, and each matrix is copied to the pinned piece first, which takes a CPU 10 ms for all of
them. NumPy copies: PyTorch would wake a thread of each core for it, and they would keep the
engine's own thread from its core.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_ALIGNED = 256
"""Bytes: where a matrix may begin."""


class Ferry:
    """`num_bytes` on the way to `device`; `arrive` waits for what was carried."""

    def __init__(self, num_bytes: int, device: torch.device, arrive: Callable[[], None]) -> None:
        self.device, self.arrive = device, arrive
        is_cuda = device.type == "cuda"
        self.room = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        self._at = 0

    def carry(self, matrix: Tensor) -> Tensor:
        """`matrix` on the device, by the current stream; valid until the next one is carried."""
        size = matrix.nbytes
        if self._at + size > self.room.numel():
            self.arrive()
            self._at = 0
        there = self.room[self._at : self._at + size]
        self._at += -(-size // _ALIGNED) * _ALIGNED
        np.copyto(there.numpy(), matrix.reshape(-1).view(torch.uint8).numpy())
        return there.view(matrix.dtype).view(matrix.shape).to(self.device, non_blocking=True)
