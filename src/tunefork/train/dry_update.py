"""An optimiser's update that takes the memory and the time of a real one, and moves nothing.

The gradient is zero and the learning rate 0, so AdamW adds 0 to each weight: only -0.0 becomes 0.0,
and is put back. Its states are kept while the caller is at it, then dropped, and so are the
generators of stochastic rounding (a weight that is bf16's already is not rounded).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tunefork.train.out_of_memory import Remedies, phase
from tunefork.train.release import Release
from tunefork.train.state import Optimizer


def zero_gradients(optimizer: Optimizer) -> None:
    """Gradients of zero, where a micro-batch before would have left its own."""
    for parameter in optimizer.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        else:
            parameter.grad.zero_()


@contextmanager
def dry_update(
    optimizer: Optimizer, remedies: Remedies | None, release: Release | None = None
) -> Iterator[float]:
    """An update that moves nothing, and its states while entered; yields its seconds.

    With a `release` of the optimiser's no two gradients are there together. An
    optimiser with states (a resumed run's) has taken its memory, and is left alone.
    """
    if optimizer.has_states():
        yield 0.0
        return
    zeros = [_negative_zeros(parameter) for parameter in optimizer.parameters]
    start = time.perf_counter()
    try:
        with phase("optimiser step", remedies, "rehearsal"):
            if release is not None:
                release.dry_update()
            else:
                zero_gradients(optimizer)
                optimizer.step(0.0)
        yield time.perf_counter() - start
    finally:
        for parameter, places in zip(optimizer.parameters, zeros, strict=True):
            parameter.detach().view(-1)[places] = -0.0
        optimizer.forget()


def _negative_zeros(parameter: Tensor) -> Tensor:
    flat = parameter.detach().view(-1)
    return ((flat == 0) & flat.signbit()).nonzero()[:, 0]
