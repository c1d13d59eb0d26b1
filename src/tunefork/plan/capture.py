"""A compiled decoder layer on the meta device: its two graphs, from the compiler itself.

What a compiled layer keeps for its backward pass is not what its source says: AOTAutograd chooses
what to keep and what to work out again. So the plan asks it. The layers of a shallow model are
given to it with a backend that takes the two graphs of each and makes no kernels; these become
programs (`plan/graph.py`). Two ways lead there:

    torch.compile   as in a run, Dynamo's reading of the layer's code and AOTAutograd's tracing
                    included: where there is a GPU, so that what this version of PyTorch does is
                    what is planned, and for `selective`, which Dynamo translates
    the partitioner alone, over a graph of our own (`plan/recorded.py`), in a tenth of the time:
                    the same programs (`tests/plan/test_capture.py`)
"""

import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from tunefork.data.pack import Segments
from tunefork.kernels.compiled import standing_for_gpu
from tunefork.model.layers import decoder_layers, prepare_layers
from tunefork.model.packed_attention import in_place_of_mask
from tunefork.plan.graph import (
    TOKENS,
    UnknownOperationError,
    attention_results,
    program_of,
    second_run,
)
from tunefork.plan.program import Program
from tunefork.plan.recorded import joint_graph
from tunefork.recipe import Checkpointing


@dataclass(frozen=True, slots=True)
class Layer:
    """A compiled layer's forward and backward pass."""

    forward: Program
    backward: Program
    num_results: int
    """Of the forward graph's outputs, which come first; the others are kept for the backward."""
    again: Program
    """The second run of one that is run again."""
    spared: Program
    """The same where it is given what attention made."""
    attention: tuple[str, ...]
    """That, among the forward graph's tensors."""


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


def capture(
    model: PreTrainedModel, checkpointing: Checkpointing, *, gates: bool = True
) -> list[Layer] | None:
    """Each decoder layer of a built `model` on the meta device, compiled, where that can be had.

    None where a layer is not one graph or holds what the programs do not know: it is planned as
    written then, which takes more. `gates` is that of `prepare_layers`. But for what that does to
    MLPs the model is as before afterwards.
    """
    if checkpointing == "selective" or torch.cuda.is_available():
        return _compiled(model, checkpointing, gates)
    found = _traced(model, gates)
    return _compiled(model, checkpointing, gates) if found is None else found


@dataclass(slots=True)
class _Pair:
    """Forward and backward graph of a layer, as they come."""

    forward: Any = None
    backward: Any = None

    def compilers(self) -> dict[str, Any]:
        """Graphs are kept, not compiled, and decomposed and partitioned as Inductor has them."""
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        return {
            "fw_compiler": partial(self._keep, "forward"),
            "bw_compiler": partial(self._keep, "backward"),
            "decompositions": select_decomp_table(),
            "partition_fn": partial(min_cut_rematerialization_partition, compiler="inductor"),
        }

    def _keep(self, name: str, module: Any, _inputs: Any) -> Any:
        setattr(self, name, module)

        def run(arguments: list[Any]) -> Any:
            del arguments
            results = module.graph.output_node().args[0]
            return [_empty(node.meta.get("val")) if node else None for node in results]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def layer(self) -> Layer:
        """Raises UnknownOperationError."""
        if self.backward is None:
            raise UnknownOperationError("a layer without a backward pass")
        forward, backward = program_of(self.forward), program_of(self.backward)
        num_kept = sum(not name.startswith("tangents") for name in backward.inputs)
        again, spared = (second_run(self.forward, has_attention=given) for given in (False, True))
        num_results, attention = len(forward.outputs) - num_kept, attention_results(self.forward)
        return Layer(forward, backward, num_results, again, spared, attention)


def _empty(value: Any) -> Any:
    """A result of a graph that is not run."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _compiled(
    model: PreTrainedModel, checkpointing: Checkpointing, gates: bool = True
) -> list[Layer] | None:
    """By torch.compile."""
    found = _Backend()
    # Beside the layers' own graphs, checkpointing and offloading run as they are.
    inner: Checkpointing = "selective" if checkpointing == "selective" else "none"
    layers = decoder_layers(model)
    compiler = partial(torch.compile, backend=found)
    prepare_layers(model, inner, compiles=True, dynamic=False, gates=gates, compiler=compiler)
    for at, layer in enumerate(layers):
        layer.forward = partial(_noting, found, at, layer.forward)
    try:
        _pass(model)
        pairs = [found.ran.get(at, []) for at in range(len(layers))]
        if any(len(of_layer) != 1 for of_layer in pairs):
            return None  # a layer of several graphs
        return [of_layer[0].layer() for of_layer in pairs]
    except (UnknownOperationError, TorchDynamoException):
        return None
    finally:
        _restore(model)
        # The shapes seen here must not make a run's own compilation think that shapes vary.
        torch._dynamo.reset()


@dataclass(slots=True)
class _Backend:
    """Of torch.compile: one call a graph, which is kept and run as it is."""

    at: int = -1
    """Layer at work."""
    ran: dict[int, list[_Pair]] = field(default_factory=dict)

    def __call__(self, graph: Any, example: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        pair = _Pair()
        options = pair.compilers()
        run = options["fw_compiler"]

        def noting(module: Any, inputs: Any) -> Any:
            kept = run(module, inputs)

            def forward(arguments: list[Any]) -> Any:
                self.ran.setdefault(self.at, []).append(pair)
                return kept(arguments)

            forward._boxed_call = True  # type: ignore[attr-defined]
            return forward

        return aot_autograd(**options | {"fw_compiler": noting})(graph, example)


def _noting(found: _Backend, at: int, forward: Callable[..., Any], *args: Any, **more: Any) -> Any:
    found.at = at
    return forward(*args, **more)


def _traced(model: PreTrainedModel, gates: bool = True) -> list[Layer] | None:
    """By the partitioner alone."""
    found = _Tracer()
    prepare_layers(model, "none", compiles=True, gates=gates, compiler=found.compiler)
    try:
        _pass(model)
    except Exception:  # any model's code, which Dynamo may read where it cannot be recorded
        return None
    finally:
        _restore(model)
    return found.layers


@dataclass(slots=True)
class _Tracer:
    """In the place of torch.compile: each layer is traced, those that are alike once."""

    layers: list[Layer] = field(default_factory=list)
    known: dict[Hashable, Layer] = field(default_factory=dict)

    def compiler(self, run: Callable[..., Any], *, dynamic: bool | None = None) -> Any:
        """What runs a layer."""
        del dynamic
        return partial(self._run, run)

    def _run(
        self, run: Callable[..., Any], layer: nn.Module, x_d: Tensor, *args: Any, **more: Any
    ) -> Tensor:
        key = _likeness(layer)
        if key not in self.known:
            self.known[key] = _trace_layer(run, layer, x_d, args, more)
        self.layers.append(self.known[key])
        return x_d


def _likeness(layer: nn.Module) -> Hashable:
    """What a layer's graphs follow from: its tensors and its modules' settings."""
    tensors = tuple((n, t.shape, t.dtype, t.requires_grad) for n, t in layer.named_parameters())
    settings = tuple(
        (path, type(module), name, value)
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str) and name != "layer_idx"
    )
    return tensors, settings


def _trace_layer(
    run: Callable[..., Any], layer: nn.Module, x_d: Tensor, args: Any, more: Any
) -> Layer:
    """The graphs of `run(layer, x_d, *args, **more)`; weights that are frozen are constants."""
    from torch.nn.utils.stateless import _reparametrize_module

    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    given, spec = tree_flatten((args, more))
    places = [at for at, value in enumerate(given) if isinstance(value, Tensor)]

    def function(x_d: Tensor, *tensors: Tensor) -> Any:
        values, rest = list(given), tensors[len(trained) :]
        for at, tensor in zip(places, rest, strict=True):
            values[at] = tensor
        inner_args, inner_more = tree_unflatten(values, spec)
        with _reparametrize_module(layer, dict(zip(trained, tensors, strict=False))):
            return run(layer, x_d, *inner_args, **inner_more)

    pair = _Pair()
    options = pair.compilers()
    inputs = [t.detach().requires_grad_() for t in (x_d, *trained.values())]
    inputs += [given[at].detach() for at in places]
    graph = joint_graph(function, inputs, options["decompositions"])
    # Parameters, which are there anyway, cost nothing to keep.
    fixed = [*range(1, 1 + len(trained))]
    pair.forward, pair.backward = options["partition_fn"](
        graph, inputs, num_fwd_outputs=1, static_lifetime_input_indices=fixed
    )
    return pair.layer()


def _pass(model: PreTrainedModel) -> None:
    """Forward and backward, through the layers as they were prepared."""
    width = model.get_input_embeddings().weight.shape[1]
    # The first layer's input too has a gradient here, so that all layers share one graph.
    rows = torch.empty(1, TOKENS, width, dtype=model.dtype, device="meta", requires_grad=True)
    ids = torch.empty(1, TOKENS, dtype=torch.int64, device="meta")
    starts = torch.empty(2, dtype=torch.int32, device="meta")
    with _unfused(), warnings.catch_warnings():  # the compiler's imports have some of their own
        warnings.simplefilter("ignore")
        output = model.train().base_model(
            inputs_embeds=rows,
            position_ids=ids,
            **in_place_of_mask(Segments(starts, TOKENS, is_uniform=False), TOKENS),
            use_cache=False,
        )
        output.last_hidden_state.sum().backward()


def _restore(model: PreTrainedModel) -> None:
    for layer in decoder_layers(model):
        del layer.forward  # the class's own again
    model.zero_grad(set_to_none=True)
