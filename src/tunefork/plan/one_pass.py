"""One forward and backward pass of a built, shallow model, traced on the meta device."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tunefork.kernels.compiled import standing_for_gpu
from tunefork.model.layers import decoder_layers, prepare_layers
from tunefork.plan.attention import Setting, install
from tunefork.plan.built import Build, Built, built, weights
from tunefork.plan.capture import Layer
from tunefork.plan.compiled import EmptyShelf, Replay
from tunefork.plan.optimizer import Update, keeps_gradients, update
from tunefork.plan.passes import Shape, batch_of
from tunefork.plan.schema import Part
from tunefork.plan.trace import Peak, Trace, Work
from tunefork.recipe import Checkpointing
from tunefork.train.loss import loss_sum, token_losses


@dataclass(frozen=True, slots=True)
class Step:
    """A whole model's step."""

    peaks: dict[str, Peak]
    """Segment -> its highest moment."""
    work: dict[str, Work]
    """Kind of operation -> all of the step's forward and backward pass."""
    evaluation: Peak | None
    """Highest moment of a forward pass without gradients, where that was asked for."""
    static: dict[Part, int]
    """Weights, optimiser states, and gradients where they are kept: there all the time."""
    gradients: int
    """Bytes of all gradients."""
    held_gradients: int
    """Of those that are there together when weights are updated: all, or one weight's."""
    trained: int
    """Parameters that are trained."""
    update: Update
    layer_bytes: int
    """Of one decoder layer's weights."""
    is_masked: bool
    """Attention takes a mask."""
    is_compiled: bool
    """Its layers were captured compiled; where that could not be had they are as written."""

    @property
    def peak(self) -> Peak:
        """The highest moment of all."""
        return max(self.peaks.values(), key=lambda peak: peak.total)


def trace_pass(config: Any, made: Build, shape: Shape, programs: list[Layer] | None) -> Step:
    """A pass of `shape` through all layers that `config` has; compiled ones by their `programs`."""
    there, trace = _begin(config, made, shape)
    model, trained = there.model, there.trained
    _prepare(model, made, programs, trace, shape.num_segments)
    static = dict(trace.live)
    with _on(made.device, trace), _segments(model, trace), _gradients(trained, made, trace), trace:
        trace.enter_segment("forward: embedding")
        model.train()
        batch = batch_of(shape)
        loss = loss_sum(model, there.head, batch) / shape.supervised
        trace.enter_segment("backward: head")
        loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    gradients = [p.numel() * p.element_size() for p in trained]
    return Step(
        peaks=trace.peaks,
        work=trace.work,
        evaluation=None,
        static=static,
        gradients=sum(gradients),
        held_gradients=max(gradients) if made.releases else sum(gradients),
        trained=sum(p.numel() for p in trained),
        update=update(trained, made.method, made.full, made.device),
        layer_bytes=sum(t.untyped_storage().nbytes() for t in weights(_layers(model)[0])),
        is_masked=shape.is_masked and not there.head.takes_segments,
        is_compiled=programs is not None,
    )


def trace_evaluation(config: Any, made: Build, shape: Shape) -> Peak:
    """The highest moment of such a pass without gradients, in which layers are as written."""
    there, trace = _begin(config, made, shape)
    there.model.eval()
    with _on(made.device, trace), trace:
        trace.enter_segment("evaluate")
        token_losses(there.model, there.head, batch_of(shape))
    there.model.zero_grad(set_to_none=True)
    return trace.peaks["evaluate"]


def _begin(config: Any, made: Build, shape: Shape) -> tuple[Built, Trace]:
    """The built model, and a trace that knows what is there all the time."""
    install(Setting("cpu", is_masked=False), Trace())  # for what building runs
    there = built(config, made)
    trace = Trace()
    trace.squares = shape.attended
    install(Setting("cuda" if made.device == "cuda" else "cpu", shape.is_masked), trace)
    trace.adopt(weights(there.model), "weights")
    trace.adopt(there.states, "optimizer")
    if keeps_gradients(there.trained, made.method):
        for parameter in there.trained:
            parameter.grad = torch.empty_like(parameter)
            trace.adopt([parameter.grad], "gradients")
    trace.peaks.clear()
    return there, trace


def _on(device: str, trace: Trace) -> AbstractContextManager[None]:
    """Take what the device that is planned for would take."""
    return standing_for_gpu(trace.run_fused) if device == "cuda" else nullcontext()


def _prepare(
    model: PreTrainedModel, made: Build, programs: list[Layer] | None, trace: Trace, segments: int
) -> None:
    """Have the layers run as `made` says."""
    checkpointing: Checkpointing = made.checkpointing
    gates = not made.is_joint
    if programs is None:
        if checkpointing == "selective" or (checkpointing == "offload" and made.device == "cpu"):
            checkpointing = "full"  # what it is without compilation, or where memory is the host's
        prepare_layers(model, checkpointing, compiles=False, gates=gates, shelf=EmptyShelf())
        return
    # The shallower of the two models is like the beginning of the other.
    replay = Replay(dict(zip(decoder_layers(model), programs, strict=False)), trace, segments)
    # What `selective` keeps is in the programs.
    checkpointing = "none" if checkpointing == "selective" else checkpointing
    prepare_layers(
        model,
        checkpointing,
        compiles=True,
        gates=gates,
        compiler=replay.compiler,
        shelf=EmptyShelf(),
        two_runs=replay.two_runs,
    )


@contextmanager
def _gradients(trained: Sequence[nn.Parameter], made: Build, trace: Trace) -> Iterator[None]:
    """Say of gradients, as they come, that they are; where they are released, let them go."""

    def adopt(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            trace.adopt([parameter.grad], "gradients")
            if made.releases:
                taken = update([parameter], made.method, made.full, made.device)
                trace.note_room(taken.room_bytes)
                parameter.grad = None

    handles = [
        p.register_post_accumulate_grad_hook(adopt)  # type: ignore[no-untyped-call]
        for p in trained
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


@contextmanager
def _segments(model: PreTrainedModel, trace: Trace) -> Iterator[None]:
    """Name the moments after the decoder layer at work: the first, the last, those between."""
    layers = _layers(model)
    handles = []

    def enter_backward(name: str) -> None:
        trace.part = "activations"
        trace.enter_segment(f"backward: {name} layer")

    for at, layer in enumerate(layers):
        name = "first" if at == 0 else "last" if at == len(layers) - 1 else "middle"

        def forward(_module: nn.Module, _inputs: Any, name: str = name) -> None:
            if not trace.segment.startswith("backward"):  # a checkpoint's second forward pass
                trace.enter_segment(f"forward: {name} layer")

        def backward(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if tensor.requires_grad and not trace.segment.startswith("backward"):
                tensor.register_hook(lambda _: enter_backward(name))
                if name == "last":
                    trace.enter_segment("forward: head")
                    trace.part = "logits"

        handles += [layer.register_forward_pre_hook(forward), layer.register_forward_hook(backward)]
    try:
        yield
    finally:
        trace.part = "activations"
        for handle in handles:
            handle.remove()
