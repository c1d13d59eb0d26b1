"""Checkpointing whose kept inputs wait in host memory, copied both ways beside the computation.

With full checkpointing what is left of the activations is one (tokens, features) tensor a layer:
4 GiB for 16,384 tokens of an 8B model. A layer runs for several milliseconds, and copying its
input over PCIe takes fewer, so the copies hide behind it: each input leaves while the next layer
runs, and comes back while the layer above it is differentiated.

Shape legend: T tokens in any layout, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states


@dataclass(slots=True)
class _Kept:
    """One layer's input, on its way out, in host memory, or on its way back."""

    host: Tensor
    shape: torch.Size
    device: torch.device
    out: Any = None
    """Event: the copy to the host is done."""
    back: Tensor | None = None
    arrived: Any = None


@dataclass(slots=True)
class Shelf:
    """The inputs of one forward pass, last layer last, and the pinned memory they lie in."""

    kept: list[_Kept] = field(default_factory=list)
    free: list[Tensor] = field(default_factory=list)
    """Host buffers to use again: pinning memory is slow."""
    stream: Any = None

    def put(self, x_d: Tensor) -> _Kept:
        """Start copying `x_d` out."""
        x_d = x_d.detach().contiguous()
        host = next(
            (b for b in self.free if b.numel() >= x_d.numel() and b.dtype == x_d.dtype), None
        )
        if host is None:
            host = torch.empty(x_d.numel(), dtype=x_d.dtype, pin_memory=x_d.is_cuda)
        else:
            self.free = [buffer for buffer in self.free if buffer is not host]
        kept = _Kept(host, x_d.shape, x_d.device)
        if x_d.is_cuda:
            if self.stream is None:
                self.stream = torch.cuda.Stream(x_d.device)  # type: ignore[no-untyped-call]
            self.stream.wait_stream(torch.cuda.current_stream(x_d.device))
            with torch.cuda.stream(self.stream):
                host[: x_d.numel()].copy_(x_d.view(-1), non_blocking=True)
                kept.out = self.stream.record_event()
            x_d.record_stream(self.stream)
        else:
            host[: x_d.numel()].copy_(x_d.view(-1))
        self.kept.append(kept)
        return kept

    def take(self, kept: _Kept) -> Tensor:
        """`kept` back on its device; the one below it is fetched ahead."""
        self._fetch(kept)
        at = next(i for i in reversed(range(len(self.kept))) if self.kept[i] is kept)
        del self.kept[at:]
        if self.kept and kept.device.type == "cuda":
            self._fetch(self.kept[-1])
        assert kept.back is not None
        if kept.arrived is not None:
            current = torch.cuda.current_stream(kept.device)
            current.wait_event(kept.arrived)
            kept.back.record_stream(current)
        self.free.append(kept.host)
        return kept.back

    def _fetch(self, kept: _Kept) -> None:
        if kept.back is not None:
            return
        used = kept.host[: kept.shape.numel()]
        if kept.device.type != "cuda":
            kept.back = used.clone().view(kept.shape)
            return
        with torch.cuda.stream(self.stream):
            kept.back = torch.empty(kept.shape, dtype=used.dtype, device=kept.device)
            kept.back.view(-1).copy_(used, non_blocking=True)
            kept.arrived = self.stream.record_event()


class _Offloaded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor], Tensor],
        shelf: Shelf,
        draws: bool,
        x_d: Tensor,
        _anchor: Tensor,
    ) -> Tensor:
        ctx.run, ctx.shelf, ctx.random = run, shelf, None
        if draws:
            ctx.random = (torch.get_rng_state(), *get_device_states(x_d))
        y_d = run(x_d)
        ctx.kept = shelf.put(x_d)
        return y_d

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_d: Tensor) -> tuple[Tensor | None, ...]:
        x_d = ctx.shelf.take(ctx.kept).requires_grad_(ctx.needs_input_grad[3])
        now = None
        if ctx.random is not None:
            now = (torch.get_rng_state(), *get_device_states(x_d))
            torch.set_rng_state(ctx.random[0])
            set_device_states(*ctx.random[1:])
        with torch.enable_grad():
            y_d = ctx.run(x_d)
        if now is not None:
            torch.set_rng_state(now[0])
            set_device_states(*now[1:])
        torch.autograd.backward(y_d, dy_d)
        return None, None, None, x_d.grad, None


def offloaded(
    run: Callable[..., Any], shelf: Shelf, draws: bool, layer: nn.Module, x_d: Tensor, **kwargs: Any
) -> Tensor:
    """`run(layer, x_d, **kwargs)`, a (..., D) tensor, whose backward pass runs it again.

    `x_d` waits in host memory until then. Gradients of `layer`'s parameters add up in their `grad`
    (never through `torch.autograd.grad`); what is in `kwargs` gets none. With `draws` the second
    run draws the same random numbers.
    """
    # Its gradient is not asked for, but without an input that has one there is no backward pass.
    anchor = torch.empty(0, device=x_d.device, requires_grad=True)
    apply: Callable[..., Tensor] = _Offloaded.apply
    return apply(lambda x: run(layer, x, **kwargs), shelf, draws, x_d, anchor)
