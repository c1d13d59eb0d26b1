"""A compiled decoder layer in the traced step: its programs' tensors come and go in its place.

The programs (`plan/capture.py`) are run for any number of tokens. Around them layers that run again
do so as they are; what they would put into host memory goes to `EmptyShelf`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunefork.model.rerun import IS_OURS
from tunefork.model.shelf import IN_FLIGHT, is_large
from tunefork.plan.capture import Layer
from tunefork.plan.program import Program
from tunefork.plan.trace import Room, Trace

_Kept = list[Tensor | tuple[torch.Size, torch.dtype]]
"""A layer's tensors; of those in host memory the shapes."""


@dataclass(slots=True)
class EmptyShelf:
    """In the place of `model.shelf.Shelf`: what that has on the device, and nothing in the host's
    memory."""

    kept: list[_Kept] = field(default_factory=list)

    def put(self, *tensors: Tensor) -> _Kept:
        """Keep a layer's tensors; those of the layer `IN_FLIGHT` before it have left."""
        for older in self.kept[-IN_FLIGHT:][:1]:
            first = older[0]
            if isinstance(first, Tensor):
                older[:] = [
                    (x.shape, x.dtype) if isinstance(x, Tensor) and is_large(x, first) else x
                    for x in older
                ]
        self.kept.append([x.detach() for x in tensors])
        return self.kept[-1]

    def take(self, kept: _Kept) -> list[Tensor]:
        """The last layer's tensors; those of the layer below are fetched ahead."""
        backs = _fetched(kept)
        self.kept.pop()
        if self.kept:
            self.kept[-1][:] = _fetched(self.kept[-1])
        return backs


def _fetched(kept: _Kept) -> list[Tensor]:
    return [
        x if isinstance(x, Tensor) else torch.empty(x[0], dtype=x[1], device="meta") for x in kept
    ]


@dataclass(frozen=True, slots=True)
class Replay:
    """Runs a model's layers by their programs; to be given to `prepare_layers`."""

    programs: dict[nn.Module, Layer]
    trace: Trace
    segments: int
    """Of a pass, for attention."""

    def compiler(self, run: Callable[..., Any], *, dynamic: bool | None = None) -> Any:
        """In the place of torch.compile."""
        del run, dynamic
        return self._run

    def two_runs(
        self, keeps_attention: bool
    ) -> tuple[Callable[..., tuple[Tensor, list[Tensor]]], Callable[..., Tensor]]:
        """In the place of a layer's two compiled runs (`model.rerun.sparingly`)."""

        def first(
            layer: nn.Module, x_d: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, list[Tensor]]:
            program = self.programs[layer]
            keeps = program.attention if keeps_attention and IS_OURS in kwargs else ()
            return self._first(program, x_d, keeps)

        def again(
            layer: nn.Module, x_d: Tensor, kept: list[Tensor], *args: Any, **kwargs: Any
        ) -> Tensor:
            program = self.programs[layer]
            forward = program.spared if kept else program.again
            return self._differentiated(layer, forward, x_d, kept)

        return first, again

    def _run(self, layer: nn.Module, x_d: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        program = self.programs[layer]
        if not torch.is_grad_enabled():  # the first of two runs that are alike
            return self._first(program, x_d, ())[0]
        return self._differentiated(layer, program.forward, x_d, [])

    def _first(
        self, layer: Layer, x_d: Tensor, keeps: Sequence[str]
    ) -> tuple[Tensor, list[Tensor]]:
        """A run that keeps these tensors and no others."""
        tensors = _Tensors(layer.forward, self.trace, _tokens(x_d), self.segments)
        tensors.run(also=keeps)
        return tensors.result(x_d), [tensors.held[name] for name in keeps]

    def _differentiated(
        self, layer: nn.Module, forward: Program, x_d: Tensor, given: list[Tensor]
    ) -> Tensor:
        trained = [p for p in layer.parameters() if p.requires_grad]
        apply: Callable[..., Tensor] = _Replayed.apply
        program = self.programs[layer]
        return apply(program, forward, self.trace, self.segments, given, x_d, *trained)


def _tokens(x_d: Tensor) -> int:
    return x_d.numel() // x_d.shape[-1]


class _Tensors:
    """A program's tensors while it runs; those that do not leave it are bytes and no more."""

    def __init__(self, program: Program, trace: Trace, tokens: int, segments: int) -> None:
        self.program, self.trace = program, trace
        self.tokens, self.segments = tokens, segments
        self.held: dict[str, Tensor] = {}
        self.inner: dict[str, Room] = {}

    def run(self, also: Sequence[str] = ()) -> None:
        """Each kernel's results come, and what nothing needs any more goes, but for `also`."""
        leaving = {*self.program.outputs, *also}
        for kernel in self.program.kernels:
            if kernel.replaces is not None:
                self._drop(kernel.replaces)
            for name, size in kernel.makes:
                num_bytes = round(size(self.tokens))
                if name in leaving:
                    self.held[name] = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
                else:
                    self.inner[name] = self.trace.take(num_bytes)
            if room := kernel.room(self.tokens, self.segments):
                self.trace.note_room(room)
            flops = kernel.work(self.tokens, self.trace.squares)
            moved = kernel.moved(self.tokens)
            self.trace.count(kernel.kind, flops, moved, kernel.launches)
            for name in kernel.frees:
                if name not in also:
                    self._drop(name)

    def _drop(self, name: str) -> None:
        self.held.pop(name, None)
        if name in self.inner:
            self.trace.give_back(self.inner.pop(name))

    def result(self, x_d: Tensor) -> Tensor:
        """A forward program's first output, which is like its input; nobody's values, where it
        makes none."""
        name = self.program.outputs[0]
        if name is None:
            return torch.empty_like(x_d)
        return self.held[name].view(x_d.dtype).view(x_d.shape)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        forward: Program,
        trace: Trace,
        segments: int,
        given: list[Tensor],
        x_d: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        tokens = _tokens(x_d)
        tensors = _Tensors(forward, trace, tokens, segments)
        tensors.held.update(zip(layer.attention, given, strict=False))
        tensors.run()
        y_d = tensors.result(x_d)
        kept = {}
        for ours, theirs in zip(
            forward.outputs[layer.num_results :], layer.backward.inputs, strict=False
        ):
            if ours in tensors.held:
                kept[theirs] = y_d if ours == forward.outputs[0] else tensors.held[ours]
            elif ours is not None and forward.sizes[ours].per_token * tokens >= x_d.nbytes:
                kept[theirs] = x_d
        ctx.save_for_backward(*kept.values())
        ctx.names, ctx.layer, ctx.trace, ctx.segments = tuple(kept), layer, trace, segments
        ctx.tokens, ctx.likes = tokens, [(t.shape, t.dtype) for t in (x_d, *trained)]
        return y_d

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_d: Tensor) -> tuple[Tensor | None, ...]:
        tensors = _Tensors(ctx.layer.backward, ctx.trace, ctx.tokens, ctx.segments)
        tensors.held = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        ctx.maybe_clear_saved_tensors()  # as AOTAutograd does: they go as they are used
        tensors.run()
        results = [
            tensors.held[name] for name in ctx.layer.backward.outputs if name in tensors.held
        ]
        return *[None] * 5, *(_taken(results, *like) for like in ctx.likes)


def _taken(results: list[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """Of a program's results one of that size, as such."""
    for at, result in enumerate(results):
        if result.nbytes == shape.numel() * dtype.itemsize:
            return results.pop(at).view(dtype).view(shape)
    return None
