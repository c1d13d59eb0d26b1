"""Checkpointing whose kept inputs wait in host memory, copied both ways beside the computation.

With full checkpointing what is left of the activations is one (tokens, features) tensor a layer:
4 GiB for 16,384 tokens of an 8B model. A layer runs for several milliseconds, and copying its
input over PCIe takes fewer, so the copies hide behind it: each input leaves while the next layer
runs, and comes back while the layer above it is differentiated.

Shape legend: T tokens in any layout, D features.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from tunefork.errors import ModelError

_IN_FLIGHT = 2
"""Inputs that may be on their way out at once. The host launches layers faster than the GPU runs
them, and would let all of them wait for their copies in GPU memory."""


@dataclass(slots=True)
class _Kept:
    """One layer's input: on its way out, in host memory, or on its way back."""

    host: Tensor
    shape: torch.Size
    device: torch.device
    source: Tensor | None = None
    """On the device, until the copy to the host is known to be done."""
    event: Any = None
    """Of the last copy, either way."""
    back: Tensor | None = None
    holder: "weakref.ref[_Ticket] | None" = None
    """Gone with the graph of a pass whose backward pass never came."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Ticket:
    """What a graph holds of its layer's input."""

    kept: _Kept


@dataclass(slots=True)
class Shelf:
    """The inputs of one forward pass, last layer last, and the pinned memory they lie in.

    Device memory is taken and given back in the order of the computation's own stream, and the
    copies' stream is waited for before: so what is given back can be used again at once.
    """

    kept: list[_Kept] = field(default_factory=list)
    free: list[Tensor] = field(default_factory=list)
    """Host buffers to use again: pinning memory is slow."""
    stream: Any = None

    def put(self, x_d: Tensor) -> _Ticket:
        """Start copying `x_d` out."""
        self._drop_abandoned()
        x_d = x_d.detach().contiguous()
        fitting = (b for b in self.free if b.numel() >= x_d.numel() and b.dtype == x_d.dtype)
        host = next(fitting, None)
        if host is None:
            host = torch.empty(x_d.numel(), dtype=x_d.dtype, pin_memory=x_d.is_cuda)
        else:
            self.free = [buffer for buffer in self.free if buffer is not host]
        kept = _Kept(host, x_d.shape, x_d.device)
        if x_d.is_cuda:
            kept.source = x_d
            kept.event = self._copy(host[: x_d.numel()], x_d.view(-1))
            for older in self.kept[-_IN_FLIGHT:][:1]:
                older.event.synchronize()
                older.source = None
        else:
            host[: x_d.numel()].copy_(x_d.view(-1))
        ticket = _Ticket(kept)
        kept.holder = weakref.ref(ticket)
        self.kept.append(kept)
        return ticket

    def _drop_abandoned(self) -> None:
        """Inputs of passes that ended without a backward pass, such as out of memory."""
        for kept in [k for k in self.kept if k.holder is not None and k.holder() is None]:
            if kept.event is not None:
                kept.event.synchronize()  # its memory may be used again only after the copy
            self.kept = [other for other in self.kept if other is not kept]
            self.free.append(kept.host)

    def take(self, ticket: _Ticket) -> Tensor:
        """What `ticket` is for, back on its device; the one below it is fetched ahead."""
        kept = ticket.kept
        self._fetch(kept)
        at = next(i for i in reversed(range(len(self.kept))) if self.kept[i] is kept)
        del self.kept[at:]
        if kept.event is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.event)
        if self.kept and kept.device.type == "cuda":
            self._fetch(self.kept[-1])
        self.free.append(kept.host)
        back, kept.back = kept.back, None  # the graph keeps `kept` for as long as its last output
        assert back is not None
        return back

    def _fetch(self, kept: _Kept) -> None:
        if kept.back is not None:
            return
        used = kept.host[: kept.shape.numel()]
        if kept.source is not None:  # one of the last layers': it is still here
            kept.back, kept.source = kept.source, None
        elif kept.device.type == "cuda":
            kept.back = torch.empty(kept.shape, dtype=used.dtype, device=kept.device)
            kept.event = self._copy(kept.back.view(-1), used)
        else:
            kept.back = used.clone().view(kept.shape)

    def _copy(self, to: Tensor, source: Tensor) -> Any:
        """Copy on a stream of its own, after what was launched so far; its event."""
        device = source.device if source.is_cuda else to.device
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            return self.stream.record_event()


class _Offloaded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor], Tensor],
        again: Callable[[Tensor], Tensor],
        shelf: Shelf,
        draws: bool,
        x_d: Tensor,
        _anchor: Tensor,
    ) -> Tensor:
        ctx.again, ctx.shelf, ctx.random = again, shelf, None
        if draws:
            ctx.random = (torch.get_rng_state(), *get_device_states(x_d))
        # The first layer's input needs no gradient. Were that to show, here or in the second run,
        # its runs would be compiled apart from all others', which takes longer than the gradient.
        y_d = run(x_d.detach())
        if not isinstance(y_d, Tensor):
            raise ModelError(_REFUSED.format(f"return a {type(y_d).__name__}, not one tensor"))
        ctx.kept = shelf.put(x_d)
        return y_d

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_d: Tensor) -> tuple[Tensor | None, ...]:
        x_d = ctx.shelf.take(ctx.kept).requires_grad_()
        now = None
        if ctx.random is not None:
            now = (torch.get_rng_state(), *get_device_states(x_d))
            torch.set_rng_state(ctx.random[0])
            set_device_states(*ctx.random[1:])
        with torch.enable_grad():
            y_d = ctx.again(x_d)
        if now is not None:
            torch.set_rng_state(now[0])
            set_device_states(*now[1:])
        torch.autograd.backward(y_d, dy_d)
        return None, None, None, None, x_d.grad if ctx.needs_input_grad[4] else None, None


_REFUSED = (
    "train.activation_checkpointing: offload is for layers of one tensor, and this model's {}; "
    "set full"
)


class _Unread(torch.autograd.Function):
    """Stands for a result whose values nobody reads, and takes its gradient to where it was made.

    What only they were made of is then dead code to a compiler.
    """

    @staticmethod
    def forward(ctx: Any, y_d: Tensor) -> Tensor:
        return torch.empty(y_d.shape, dtype=y_d.dtype, device=y_d.device)  # of its size alone

    @staticmethod
    def backward(ctx: Any, dy_d: Tensor) -> Tensor:
        return dy_d


def unread(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`run`, to be compiled for a layer's second run: the gradient passes, the values are not made.

    A decoder layer ends with the MLP's last product, a quarter of its arithmetic, of which its own
    backward pass needs the input alone.
    """
    y_d = run(*args, **kwargs)
    if not isinstance(y_d, Tensor):
        return y_d
    apply: Callable[..., Tensor] = _Unread.apply
    return apply(y_d)


def offloaded(
    run: Callable[..., Any],
    again: Callable[..., Any],
    shelf: Shelf,
    draws: bool,
    layer: nn.Module,
    x_d: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """`run(layer, x_d, *args, **kwargs)`, a (..., D) tensor, whose backward pass runs `again` for
    it: the same, but that what it returns may be anything of that size.

    `x_d` waits in host memory until then. Gradients of `layer`'s parameters add up in their `grad`
    (never through `torch.autograd.grad`). With `draws` the second run draws the same random
    numbers. Raises ModelError where something else than `x_d` would need a gradient, or the result
    is no tensor.
    """
    for given in (*args, *kwargs.values()):
        parts = given if isinstance(given, list | tuple) else (given,)
        if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
            raise ModelError(_REFUSED.format("share another tensor that needs a gradient"))
    if not (x_d.requires_grad or any(p.requires_grad for p in layer.parameters())):
        with torch.no_grad():  # below the first layer that is trained
            return cast(Tensor, run(layer, x_d, *args, **kwargs))
    # Its gradient is not asked for, but without an input that has one there is no backward pass.
    anchor = torch.empty(0, device=x_d.device, requires_grad=True)
    apply: Callable[..., Tensor] = _Offloaded.apply
    first, second = (lambda x, f=f: f(layer, x, *args, **kwargs) for f in (run, again))
    return apply(first, second, shelf, draws, x_d, anchor)
