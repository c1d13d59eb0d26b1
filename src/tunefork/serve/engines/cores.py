"""Of a server's threads only the engine's computes with all cores of a CPU.

A thread that runs a large operation of PyTorch gets helpers from OpenMP, and they stay as long as
the thread does. GNU's OpenMP counts them: where they are more than cores, none waits at work for
the next operation, but sleeps at once, and waking up is longer than most operations of a decoding
pass. Two cores of an EPYC, SmolLM2-135M, 16 rows: 57 ms a pass, and 67 ms with one more thread that
has helpers; over 8 adapters 66 and 90 ms.

So who loads the base ends, and those that read adapters have no helpers.
"""

import asyncio
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


async def in_a_thread(do: Callable[[], Result]) -> Result:
    """What `do` gives in a thread that then ends, with its helpers: those of `asyncio.to_thread`
    stay."""
    once = ThreadPoolExecutor(1)
    try:
        return await asyncio.get_running_loop().run_in_executor(once, do)
    finally:
        once.shutdown(wait=False)


def use_one_core() -> None:
    """The calling thread computes without helpers from now on.

    `torch.set_num_threads` would say so to all threads that begin later, too.
    """
    torch.get_num_threads()  # the first question of a thread makes PyTorch set its number
    openmp = ctypes.CDLL(torch._C.__file__)
    if hasattr(openmp, "omp_set_num_threads"):  # PyTorch may be built without it
        openmp.omp_set_num_threads(1)
