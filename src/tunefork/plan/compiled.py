"""A compiled decoder layer in the traced step: its programs' tensors come and go in its place.

The programs (`plan/capture.py`) are run for any number of tokens. Around them checkpointing and
offloading run as they are; what they would put into host memory goes to `EmptyShelf`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunefork.model.offload import unread
from tunefork.plan.capture import Layer
from tunefork.plan.program import Program
from tunefork.plan.trace import Room, Trace


@dataclass(slots=True)
class EmptyShelf:
    """In the place of `model.offload.Shelf`: of what is put there one tensor is on its way."""

    moving: Tensor | None = None
    num_kept: int = 0

    def put(self, x_d: Tensor) -> tuple[torch.Size, torch.dtype]:
        """Keep the shape; the tensor itself is copied while the next layer runs."""
        self.moving = x_d.detach()
        self.num_kept += 1
        return x_d.shape, x_d.dtype

    def take(self, kept: tuple[torch.Size, torch.dtype]) -> Tensor:
        """A tensor of the shape; the one below it is fetched ahead."""
        back = torch.empty(kept[0], dtype=kept[1], device="meta")
        self.num_kept -= 1
        self.moving = torch.empty_like(back) if self.num_kept else None
        return back


@dataclass(frozen=True, slots=True)
class Replay:
    """Runs a model's layers by their programs; to be given to `prepare_layers`."""

    programs: dict[nn.Module, Layer]
    trace: Trace
    segments: int
    """Of a pass, for attention."""

    def compiler(self, run: Callable[..., Any], *, dynamic: bool | None = None) -> Any:
        """In the place of torch.compile."""
        del dynamic
        return partial(self._run, getattr(run, "func", None) is unread)

    def _run(
        self, is_unread: bool, layer: nn.Module, x_d: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        program = self.programs[layer]
        if is_unread:
            program = replace(program, forward=program.again)
        if not torch.is_grad_enabled():  # offloading's first run, which is compiled to keep nothing
            tensors = _Tensors(program.forward, self.trace, _tokens(x_d), self.segments)
            tensors.run()
            return tensors.result(x_d)
        trained = [p for p in layer.parameters() if p.requires_grad]
        apply: Callable[..., Tensor] = _Replayed.apply
        return apply(program, self.trace, self.segments, x_d, *trained)


def _tokens(x_d: Tensor) -> int:
    return x_d.numel() // x_d.shape[-1]


class _Tensors:
    """A program's tensors while it runs; those that do not leave it are bytes and no more."""

    def __init__(self, program: Program, trace: Trace, tokens: int, segments: int) -> None:
        self.program, self.trace = program, trace
        self.tokens, self.segments = tokens, segments
        self.held: dict[str, Tensor] = {}
        self.inner: dict[str, Room] = {}

    def run(self) -> None:
        """Each kernel's results come, and what nothing needs any more goes."""
        leaving = set(self.program.outputs)
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
            self.trace.count(kernel.kind, flops, kernel.moved(self.tokens))
            for name in kernel.frees:
                self._drop(name)

    def _drop(self, name: str) -> None:
        self.held.pop(name, None)
        if name in self.inner:
            self.trace.give_back(self.inner.pop(name))

    def result(self, x_d: Tensor) -> Tensor:
        """A forward program's first output, which is like its input."""
        return self.held[self.program.outputs[0] or ""].view(x_d.dtype).view(x_d.shape)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: Layer, trace: Trace, segments: int, x_d: Tensor, *trained: Tensor
    ) -> Tensor:
        tokens = _tokens(x_d)
        tensors = _Tensors(layer.forward, trace, tokens, segments)
        tensors.run()
        y_d = tensors.result(x_d)
        kept = {}
        for ours, theirs in zip(
            layer.forward.outputs[layer.num_results :], layer.backward.inputs, strict=False
        ):
            if ours in tensors.held:
                kept[theirs] = y_d if ours == layer.forward.outputs[0] else tensors.held[ours]
            elif ours is not None and layer.forward.sizes[ours].per_token * tokens >= x_d.nbytes:
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
        return None, None, None, *(_taken(results, *like) for like in ctx.likes)


def _taken(results: list[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """Of a program's results one of that size, as such."""
    for at, result in enumerate(results):
        if result.nbytes == shape.numel() * dtype.itemsize:
            return results.pop(at).view(dtype).view(shape)
    return None
