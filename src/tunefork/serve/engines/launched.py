"""A pass that was launched: what it gives, once a GPU has computed it.

Shape legend: R rows of which logits are wanted, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Arriving:
    """Tokens on their way to the host: what is launched after them is not waited for."""

    def __init__(self, tokens_r: Tensor) -> None:
        """(R,) int64. A GPU's begin to cross now, in the order of its stream."""
        self._here_r = tokens_r
        self._is_there: torch.cuda.Event | None = None
        if tokens_r.is_cuda:
            here_r = torch.empty_like(tokens_r, device="cpu", pin_memory=True)
            self._here_r = here_r.copy_(tokens_r, non_blocking=True)
            self._is_there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._is_there.record()

    def wait(self) -> list[int]:
        """All of them. A GPU is waited for by an event, outside of the driver: a copy to memory
        that is not pinned waits within it, and may keep out a thread that brings an adapter."""
        if self._is_there is not None:
            self._is_there.synchronize()
        numbers: list[int] = self._here_r.tolist()
        return numbers


@dataclass(frozen=True, slots=True)
class Launched:
    """What a pass gives."""

    logits_rv: Tensor
    """Until the next pass is launched."""
    tokens_r: Tensor
    """The likeliest, as `choose.greedy`, or drawn; no other pass overwrites them."""
    arriving: Arriving
    """The same."""


@dataclass(frozen=True, slots=True)
class Follows:
    """Where a pass finds its first tokens: on the device, as the pass before chooses them."""

    tokens_r: Tensor
    rows: Sequence[int]
    """Of `tokens_r`, one for each of the first parts, which are of one token."""
