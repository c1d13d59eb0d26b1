"""How fast this host starts operations: what bounds a small model's step, whatever its GPU.

Training small models in eager PyTorch waits for Python to start thousands of short operations, so a
step's time follows the host's speed and not the GPU's. It is measured in a tenth of a second.
"""

import statistics
import time

import torch

_OPERATIONS, _REPEATS = 500, 9
"""Few enough to stay within the GPU's queue, where starting one more does not wait for the last."""


def operation_seconds(device: torch.device) -> float:
    """Seconds to start one small operation on `device`: the median of some repeats."""
    small = torch.ones(64, device=device)
    found = []
    for _ in range(_REPEATS):
        _wait(device)
        started = time.perf_counter()
        for _ in range(_OPERATIONS):
            small = small * 1.0
        found.append((time.perf_counter() - started) / _OPERATIONS)
    _wait(device)
    return statistics.median(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
