"""The `train.deterministic` setting: a run gives the same bits each time, on a GPU too.

A CPU does so by itself for one number of threads. On a GPU three things do not: kernels that add
up by atomics in whatever order (among them the attention's backward passes, which PyTorch then
runs in their ordered form), cuBLAS with several streams' workspaces, and cuDNN's choice among
algorithms by a measurement of its own. Sources: PyTorch's notes on randomness,
https://docs.pytorch.org/docs/stable/notes/randomness.html, and cuBLAS's on reproducibility,
https://docs.nvidia.com/cuda/cublas/#results-reproducibility.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def prepare(wanted: bool) -> None:
    """Before anything runs on a GPU: cuBLAS reads its workspace's size once."""
    if wanted:
        os.environ.setdefault(_WORKSPACE, ":4096:8")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """While entered, an operation that has no repeatable form raises RuntimeError."""
    if not wanted:
        yield
        return
    memory: Any = torch.utils.deterministic
    was_on, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling fresh memory finds reads of what nobody wrote; it repeats nothing and costs time.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)
        torch.backends.cudnn.benchmark = benchmark
        memory.fill_uninitialized_memory = fill
