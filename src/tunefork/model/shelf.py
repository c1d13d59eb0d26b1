"""Where layers leave what they keep until their backward pass: where it is, or in host memory.

A shelf's `put` takes a layer's tensors, its input first, and returns a ticket; `take` gives them
back for it. The last layer's are taken first.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IN_FLIGHT = 2
"""Layers whose tensors may be on their way out at once. The host launches layers faster than the
GPU runs them, and would let all of them wait for their copies in GPU memory."""
_SMALL = 16


def is_large(x: Tensor, first: Tensor) -> bool:
    """Whether a tensor is worth copying, beside its layer's `first`; or else it stays."""
    return x.nbytes * _SMALL > first.nbytes


class Held:
    """They stay on their device."""

    def put(self, *tensors: Tensor) -> list[Tensor]:
        """They are their own ticket."""
        return [x.detach() for x in tensors]

    def take(self, ticket: list[Tensor]) -> list[Tensor]:
        """What was put there."""
        return ticket


@dataclass(slots=True)
class _Part:
    """A tensor: on its way out, in host memory, or on its way back."""

    shape: torch.Size
    host: Tensor | None
    """None for what stays."""
    source: Tensor | None
    """On the device, until the copy to the host is known to be done."""
    back: Tensor | None = None

    @property
    def used(self) -> Tensor:
        """Of the host's buffer what the tensor takes."""
        assert self.host is not None
        return self.host[: self.shape.numel()]


@dataclass(slots=True)
class _Kept:
    """One layer's tensors."""

    parts: list[_Part]
    device: torch.device
    event: Any = None
    """Of the last copy, either way."""
    is_fetched: bool = False
    holder: "weakref.ref[_Ticket] | None" = None
    """Gone with the graph of a pass whose backward pass never came."""

    def has_left(self) -> None:
        """Let go of the device's memory, once the copies out are done."""
        if self.event is not None:
            self.event.synchronize()
        for part in self.parts:
            if part.host is not None:
                part.source = None


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Ticket:
    """What a graph holds of its layer's tensors."""

    kept: _Kept


@dataclass(slots=True)
class Shelf:
    """They lie in pinned host memory, and are copied both ways beside the computation: each layer's
    leave while the next one runs, and come back while the layer above is differentiated.

    Device memory is taken and given back in the order of the computation's own stream, and the
    copies' stream is waited for before: so what is given back can be used again at once.
    """

    kept: list[_Kept] = field(default_factory=list)
    free: list[Tensor] = field(default_factory=list)
    """Host buffers to use again: pinning memory is slow."""
    stream: Any = None

    def put(self, *tensors: Tensor) -> _Ticket:
        """Start copying a layer's `tensors` out, its input first."""
        self._drop_abandoned()
        parts = [self._part(x.detach().contiguous(), tensors[0]) for x in tensors]
        kept = _Kept(parts, tensors[0].device)
        leaving = [
            (p.used, p.source.view(-1))
            for p in parts
            if p.host is not None and p.source is not None
        ]
        kept.event = self._copy(kept.device, leaving)
        if kept.device.type != "cuda":
            kept.has_left()
        for older in self.kept[-IN_FLIGHT:][:1]:
            older.has_left()
        ticket = _Ticket(kept)
        kept.holder = weakref.ref(ticket)
        self.kept.append(kept)
        return ticket

    def _part(self, x: Tensor, first: Tensor) -> _Part:
        if not is_large(x, first):
            return _Part(x.shape, None, x)
        fitting = (b for b in self.free if b.numel() >= x.numel() and b.dtype == x.dtype)
        host = next(fitting, None)
        if host is None:
            host = torch.empty(x.numel(), dtype=x.dtype, pin_memory=x.is_cuda)
        else:
            self.free = [buffer for buffer in self.free if buffer is not host]
        return _Part(x.shape, host, x)

    def _drop_abandoned(self) -> None:
        """What passes kept that ended without a backward pass, such as out of memory."""
        for kept in [k for k in self.kept if k.holder is not None and k.holder() is None]:
            kept.has_left()  # its memory may be used again only after the copies
            self.kept = [other for other in self.kept if other is not kept]
            self._give_back(kept)

    def _give_back(self, kept: _Kept) -> None:
        self.free.extend(part.host for part in kept.parts if part.host is not None)

    def take(self, ticket: _Ticket) -> list[Tensor]:
        """What `ticket` is for, back on its device; the layer's below it is fetched ahead."""
        kept = ticket.kept
        self._fetch(kept)
        at = next(i for i in reversed(range(len(self.kept))) if self.kept[i] is kept)
        del self.kept[at]  # others above it may be of a pass that comes later
        if kept.event is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.event)
        if at > 0 and kept.device.type == "cuda":
            self._fetch(self.kept[at - 1])
        self._give_back(kept)
        return [part.back for part in kept.parts if part.back is not None]

    def _fetch(self, kept: _Kept) -> None:
        if kept.is_fetched:
            return
        kept.is_fetched = True
        arriving = []
        for part in kept.parts:
            if part.source is not None:  # it stayed, or is one of the last layers' and still here
                part.back, part.source = part.source, None
            else:
                part.back = torch.empty(part.shape, dtype=part.used.dtype, device=kept.device)
                arriving.append((part.back.view(-1), part.used))
        if arriving:
            kept.event = self._copy(kept.device, arriving)

    def _copy(self, device: torch.device, pairs: Iterable[tuple[Tensor, Tensor]]) -> Any:
        """Copy each second to its first, on a GPU on a stream of its own, after what was launched
        so far; the event of the last."""
        if device.type != "cuda":
            for to, source in pairs:
                to.copy_(source)
            return None
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            return self.stream.record_event()
