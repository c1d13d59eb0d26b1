"""A layer's forward and backward pass as one graph, written down as it runs on the meta device.

What AOTAutograd gets by tracing through four layers of Python a tensor, at two milliseconds an
operation, is here one dispatch mode: operations become nodes, decomposed as Inductor has them. The
graph is for the partitioner (`plan/capture.py`), which wants no operation that changes what it is
given: those of ours that do are written as AOTAutograd writes them, as operations that give the
changed tensor anew. `tests/plan/test_capture.py` holds the programs against torch.compile's.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tunefork.plan import meta_results
from tunefork.plan.graph import UnknownOperationError
from tunefork.plan.operators import WRITTEN_OVER

_FUNCTIONAL = torch.ops.higher_order.auto_functionalized_v2


def joint_graph(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    decompositions: Mapping[Any, Callable[..., Any]],
) -> GraphModule:
    """`function(*inputs)`, one tensor, and the gradients of those of `inputs` that have one.

    Inputs are named `primals_1` and so on, the result's gradient `tangents_1`, as AOTAutograd does.
    Raises UnknownOperationError for what changes a tensor in place.
    """
    recorder = _Recorder(decompositions)
    for at, tensor in enumerate(inputs, start=1):
        recorder.place(f"primals_{at}", tensor)
    with recorder:
        result = function(*inputs)
    if not isinstance(result, Tensor):
        raise UnknownOperationError("a layer of several results")
    tangent = torch.empty_like(result)
    recorder.place("tangents_1", tangent)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    recorder.tag = {"partitioner_tag": "is_backward"}
    with recorder:
        gradients = iter(torch.autograd.grad(result, wanted, tangent))
    outputs: list[Node | None] = [recorder.node(result)]
    outputs += [recorder.node(next(gradients)) if t.requires_grad else None for t in inputs]
    recorder.graph.output(outputs)
    return GraphModule(recorder.held, recorder.graph)


class _Recorder(TorchDispatchMode):
    def __init__(self, decompositions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.decompositions = decompositions
        self.held: dict[str, Tensor] = {}
        """Tensors that the function has of its own."""
        self.tag: dict[str, Any] = {}
        self.nodes: dict[int, tuple[Tensor, Node]] = {}
        """By identity; the tensor is kept, for no other to have it."""
        self.wholes: dict[int, Tensor] = {}
        """Storage -> the tensor that it was made for."""
        self.constants: set[int] = set()
        """Storages of `held` tensors, of which several may be views of one, while none changes."""

    def place(self, name: str, tensor: Tensor) -> None:
        """Make `tensor` an input."""
        placeholder = self.graph.placeholder(name)
        placeholder.meta["val"] = tensor
        self._bind(tensor, placeholder)

    def node(self, tensor: Tensor) -> Node:
        """What gives `tensor`; one that was not seen is a constant."""
        if id(tensor) in self.nodes:
            return self.nodes[id(tensor)][1]
        storage = tensor.untyped_storage()._cdata
        if storage in self.wholes and storage not in self.constants:
            raise UnknownOperationError("a view from before its tensor was changed in place")
        self.constants.add(storage)
        name = f"_tensor_constant{len(self.held)}"
        self.held[name] = tensor
        node = self.graph.get_attr(name)
        node.meta["val"] = tensor
        self._bind(tensor, node)
        return node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for simpler in (self.decompositions.get(func), func.decompose):
            with self:
                result = NotImplemented if simpler is None else simpler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in WRITTEN_OVER:
            return self._change(func, args, kwargs)
        if func._schema.is_mutable:
            raise UnknownOperationError(str(func))
        result = meta_results.call(func, args, kwargs)
        given, more = tree_map_only(Tensor, self.node, (args, kwargs))
        self._bind(result, self._add(func, given, more, result))
        return result

    def _change(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """An argument, changed in place: the tensor that it is a view of is another then."""
        result = func(*args, **kwargs)
        place = WRITTEN_OVER[func]
        storage = args[place].untyped_storage()._cdata
        self.constants.discard(storage)
        whole = self.wholes[storage]
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, tree_map_only(Tensor, self.node, args), strict=True))
        del given[names[place]]
        changed = {**given, "_all_bases": [self.node(whole)]}
        results = result if isinstance(result, tuple) else (result,)
        node = self._add(_FUNCTIONAL, (func,), changed, (*results, whole))
        for key, (tensor, _) in list(self.nodes.items()):
            if tensor.untyped_storage()._cdata == storage:
                del self.nodes[key]
        self._bind((*results, whole), node)
        return result

    def _add(self, target: Any, args: Any, kwargs: Any, value: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta |= {"val": value, **self.tag}
        return node

    def _bind(self, value: Any, node: Node) -> None:
        if isinstance(value, Tensor):
            self.nodes[id(value)] = (value, node)
            self.wholes.setdefault(value.untyped_storage()._cdata, value)
        elif isinstance(value, list | tuple):
            for at, part in enumerate(value):
                if isinstance(part, Tensor):
                    self._bind(part, self._add(operator.getitem, (node, at), {}, part))
