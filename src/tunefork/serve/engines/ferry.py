"""Host memory to a GPU, by way of a piece of pinned memory that is there from the start.

A GPU copies from pinned memory by itself, while others go on. But pinning takes long, and holds up
whoever launches something meanwhile. So adapters lie in ordinary memory, and come in parts: as many
layers as have room are copied to the pinned piece, 10 ms of a CPU for an adapter of an 8B model,
and cross at once. A crossing and kernels for each matrix took 0.63 s on an H200 beside an engine at
work: 13 launches a step, whatever a step took. NumPy copies: PyTorch would wake a thread of each
core for it, and they would keep the engine's own thread from its core.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from tunefork.registry.peft_deltas import Delta, Deltas

_ALIGNED = 256
"""Bytes: where a matrix may begin."""


class Ferry:
    """`num_bytes` on the way to `device`; `arrive` waits for what was asked of the device."""

    def __init__(self, num_bytes: int, device: torch.device, arrive: Callable[[], None]) -> None:
        self.arrive = arrive
        is_cuda = device.type == "cuda"
        self.here = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        self.there = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def carry(self, found: Deltas) -> Iterator[Deltas]:
        """Parts of `found` on the device, by the current stream. Each is there until the next is
        asked for, which waits for what was launched with it; the last is not waited for."""
        part, at = Deltas(), 0
        for path, delta in found.items():
            if at + _room(delta.lora_a) + _room(delta.lora_b) > self.here.numel():
                yield self._cross(part, at)
                self.arrive()
                part, at = Deltas(), 0
            pair = []
            for matrix in (delta.lora_a, delta.lora_b):
                span = slice(at, at + matrix.nbytes)
                np.copyto(self.here[span].numpy(), matrix.reshape(-1).view(torch.uint8).numpy())
                pair.append(self.there[span].view(matrix.dtype).view(matrix.shape))
                at += _room(matrix)
            part[path] = Delta(pair[0], pair[1], delta.scale)
        yield self._cross(part, at)

    def _cross(self, part: Deltas, num_bytes: int) -> Deltas:
        self.there[:num_bytes].copy_(self.here[:num_bytes], non_blocking=True)
        return part


def _room(matrix: Tensor) -> int:
    return -(-matrix.nbytes // _ALIGNED) * _ALIGNED
