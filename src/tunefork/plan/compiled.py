"""A compiled decoder layer on the meta device: captured once, replayed for any number of tokens.

What a compiled layer keeps for its backward pass is not what its source says: AOTAutograd chooses
what to keep and what to work out again. So the plan asks it. A model of few layers goes through
torch.compile with a backend that takes the two graphs of each layer and makes no kernels; these
become programs (`plan/program.py`), and in the traced step a program's tensors come and go in the
place of the layer's.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from tunefork.data.pack import Segments
from tunefork.kernels.compiled import standing_for_gpu
from tunefork.model.layers import decoder_layers, prepare_layers
from tunefork.model.packed_attention import in_place_of_mask
from tunefork.plan.program import TOKENS, Program, UnknownOperationError, program_of
from tunefork.plan.trace import Trace
from tunefork.recipe import Checkpointing


@dataclass(frozen=True, slots=True)
class Layer:
    """A compiled layer's forward and backward pass."""

    forward: Program
    backward: Program
    num_results: int
    """Of the forward graph's outputs, which come first; the others are kept for the backward."""


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


def takes_segments(model: PreTrainedModel) -> bool:
    """Whether a model on the meta device accepts segments in place of a mask.

    Whether it heeds them is measured where there are weights (`model/packed_probe.py`).
    """
    ids = torch.empty(1, 8, dtype=torch.int64, device="meta")
    starts = torch.empty(2, dtype=torch.int32, device="meta")
    told = in_place_of_mask(Segments(starts, 8, is_uniform=False), 8)
    try:
        with torch.no_grad(), _unfused():
            model.base_model(input_ids=ids, position_ids=ids, **told, use_cache=False)
    except (ValueError, TypeError, IndexError, RuntimeError):
        return False
    return True


def _unfused() -> AbstractContextManager[None]:
    """Stand for a GPU while nothing is traced."""
    return standing_for_gpu(lambda function, args, kwargs: function(*args, **kwargs))


@dataclass(slots=True)
class _Capture:
    """A backend of torch.compile: one call a graph, which is kept and run as it is."""

    at: int = -1
    """Layer at work."""
    ran: dict[int, list["_Pair"]] = field(default_factory=dict)

    def __call__(self, graph: Any, example: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        pair = _Pair()

        def keep(name: str, module: Any, _inputs: Any) -> Any:
            setattr(pair, name, module)

            def run(arguments: list[Any]) -> Any:
                if name == "forward":
                    self.ran.setdefault(self.at, []).append(pair)
                del arguments
                results = module.graph.output_node().args[0]
                return [_empty(node.meta.get("val")) if node else None for node in results]

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return aot_autograd(
            fw_compiler=partial(keep, "forward"),
            bw_compiler=partial(keep, "backward"),
            decompositions=select_decomp_table(),
            partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        )(graph, example)


def _empty(value: Any) -> Any:
    """A result of a graph that is not run."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@dataclass(slots=True)
class _Pair:
    forward: Any = None
    backward: Any = None


def capture(model: PreTrainedModel, checkpointing: Checkpointing) -> list[Layer] | None:
    """Each decoder layer of a built `model` on the meta device, compiled, where that can be had.

    None where a layer is not one graph or holds what the programs do not know: it is planned as
    written then, which takes more. The model is as before afterwards.
    """
    found = _Capture()
    # Beside the layers' own graphs, checkpointing and offloading run as they are.
    inner: Checkpointing = "selective" if checkpointing == "selective" else "none"
    layers = decoder_layers(model)
    prepare_layers(
        model, inner, compiles=True, dynamic=False, compiler=partial(torch.compile, backend=found)
    )
    for at, layer in enumerate(layers):
        layer.forward = partial(_noting, found, at, layer.forward)
    try:
        with warnings.catch_warnings():  # the compiler's imports have some of their own
            warnings.simplefilter("ignore")
            _pass(model.train())
        return [_layer(found.ran.get(at, [])) for at in range(len(layers))]
    except (UnknownOperationError, TorchDynamoException):
        return None
    finally:
        for layer in layers:
            del layer.forward  # the class's own again
        # The shapes seen here must not make a run's own compilation think that shapes vary.
        torch._dynamo.reset()
        model.zero_grad(set_to_none=True)


def _noting(found: _Capture, at: int, forward: Callable[..., Any], *args: Any, **more: Any) -> Any:
    found.at = at
    return forward(*args, **more)


def _pass(model: PreTrainedModel) -> None:
    width = model.get_input_embeddings().weight.shape[1]
    # The first layer's input too has a gradient here, so that all layers share one graph.
    rows = torch.empty(1, TOKENS, width, dtype=model.dtype, device="meta", requires_grad=True)
    ids = torch.empty(1, TOKENS, dtype=torch.int64, device="meta")
    starts = torch.empty(2, dtype=torch.int32, device="meta")
    with _unfused():
        output = model.base_model(
            inputs_embeds=rows,
            position_ids=ids,
            **in_place_of_mask(Segments(starts, TOKENS, is_uniform=False), TOKENS),
            use_cache=False,
        )
        output.last_hidden_state.sum().backward()


def _layer(pairs: Sequence[_Pair]) -> Layer:
    if len(pairs) != 1 or pairs[0].backward is None:
        raise UnknownOperationError("a layer of several graphs")
    forward, backward = program_of(pairs[0].forward), program_of(pairs[0].backward)
    num_kept = sum(not name.startswith("tangents") for name in backward.inputs)
    return Layer(forward, backward, len(forward.outputs) - num_kept)


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

    def _run(self, layer: nn.Module, x_d: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        program = self.programs[layer]
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
    """A program's tensors while it runs."""

    def __init__(self, program: Program, trace: Trace, tokens: int, segments: int) -> None:
        self.program, self.trace = program, trace
        self.tokens, self.segments = tokens, segments
        self.held: dict[str, Tensor] = {}

    def run(self) -> None:
        """Each kernel's results come, and what nothing needs any more goes."""
        for kernel in self.program.kernels:
            if kernel.replaces is not None:
                self.held.pop(kernel.replaces, None)
            for name, size in kernel.makes:
                self.held[name] = torch.empty(
                    round(size(self.tokens)), dtype=torch.uint8, device="meta"
                )
            if room := kernel.room(self.tokens, self.segments):
                self.trace.note_room(room)
            flops = kernel.work(self.tokens, self.trace.squares)
            self.trace.count(kernel.kind, flops, kernel.moved(self.tokens))
            for name in kernel.frees:
                self.held.pop(name, None)

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
