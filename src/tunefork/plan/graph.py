"""What a compiled graph allocates and does: its program, from the graph alone.

torch.compile turns a layer's forward and backward pass into two graphs of operations. Inductor,
which makes kernels of them on a GPU, gives a tensor memory where one must be there: results of
products and of attention, what these read, what leaves the graph, results of reductions, and what
several readers would each have to work out anew. All else is computed on the way from one of these
to the next and is never held. This file takes the same decisions.

The graph is captured for one number of tokens that divides no size of a weight, so that a tensor's
bytes are seen to grow with the tokens or not to.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from tunefork.plan.operators import (
    BF16_PRODUCT,
    FLASH,
    INT8_PRODUCT,
    LORA_GRADIENTS,
    PRODUCTS,
    READ_TWICE,
    WRITTEN_OVER,
    bf16_product,
    int8_product,
    kernels_of,
    lora_gradients_flops,
    product,
)
from tunefork.plan.program import Kernel, Program, Size

TOKENS = 1009
"""Of the captured pass: a prime."""
_FEW_READS, _FEW_OPERATIONS = 4, 30
"""What several readers need is computed anew by each, unless it reads more tensors than this or
takes more operations (Inductor's `realize_reads_threshold` and `realize_opcount_threshold`)."""
_GIVEN = ("placeholder", "get_attr")
"""Nodes of tensors that are there before: what is passed in, and what the layer's code holds."""
_NOT_OURS = ("primals", "tangents", "_tensor")
"""Inputs of a backward graph that belong to others."""
_REDUCTIONS = ("amax", "amin", "sum", "mean", "var", "var_mean", "prod", "any", "argmax")


class UnknownOperationError(Exception):
    """A graph holds an operation of which it is not known what memory it takes."""


def _size(amount: float) -> Size:
    """Of an amount seen with `TOKENS` tokens."""
    return Size(amount / TOKENS, 0.0) if amount % TOKENS == 0 else Size(0.0, amount)


def program_of(graph_module: GraphModule) -> Program:
    """The kernels of a graph from AOTAutograd whose nodes know their values' shapes."""
    return _Reading(list(graph_module.graph.nodes)).program()


def attention_results(graph_module: GraphModule) -> tuple[str, ...]:
    """What attention's forward pass makes in a graph."""
    return tuple(node.name for of_one in _attentions(graph_module.graph) for node in of_one.users)


def second_run(graph_module: GraphModule, *, has_attention: bool) -> Program:
    """The program of a forward graph of which the first output, a layer's result, is not read, and
    with `has_attention` what attention made is there (`model/rerun.py`)."""
    graph = torch.fx.Graph()
    results: Any = graph.graph_copy(graph_module.graph, {})
    graph.output((None, *results[1:]))
    for attention in _attentions(graph) if has_attention else []:
        for made in list(attention.users):
            with graph.inserting_before(next(iter(graph.nodes))):
                given = graph.placeholder(f"{made.name}_given")
            given.meta = made.meta
            made.replace_all_uses_with(given)
            graph.erase_node(made)
            given._rename(made.name)
        graph.erase_node(attention)
    graph.eliminate_dead_code()
    return _Reading(list(graph.nodes)).program()


def _attentions(graph: torch.fx.Graph) -> list[Node]:
    """Forward passes of attention."""
    return [n for n in graph.nodes if n.op == "call_function" and FLASH.get(_call(n)[0]) == 1.0]


class _Reading:
    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.root: dict[Node, Node] = {}
        """Whose memory a node's value lies in."""
        self.held: set[Node] = set()
        self.reads: dict[Node, dict[Node, None]] = {}
        """Of a value that is computed: the held tensors it is computed from, in the order that they
        are named in. (A set of nodes is ordered by their addresses, by another one in each run.)"""
        self.operations: dict[Node, int] = {}

    def program(self) -> Program:
        for node in self.nodes:
            self.root[node] = self._root(node)
        self._mark()
        makers = [node for node in self.nodes if self._is_kernel(node)]
        last: dict[Node, Node] = {}
        for node in makers:
            for read in self.reads[node]:
                last[read] = node
        result = self.nodes[-1]
        kept = {self.root[node] for node in _arguments(result)}
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        given = [node for node in self.nodes if node.op in _GIVEN]
        # A backward graph may write over what was kept for it, a forward graph over no input.
        is_backward = any(node.name.startswith("tangents") for node in placeholders)
        fixed = {n for n in given if not is_backward or n.name.startswith(_NOT_OURS)}
        kernels = tuple(self._kernel(node, last, kept, fixed) for node in makers)
        outputs = tree_leaves(result.args[0])
        return Program(
            kernels,
            tuple(node.name for node in placeholders),
            tuple(self.root[n].name if isinstance(n, Node) else None for n in outputs),
            {node.name: _size(_bytes(node)) for node in [*placeholders, *self.held]},
        )

    def _root(self, node: Node) -> Node:
        if node.op != "call_function":
            return node
        source = node.args[0] if node.args else None
        if _is_getitem(node) and isinstance(source, Node):
            if _is_changed_in_place(source):
                bases = _changed(source)
                # Behind what the operator returns, a None if that is nothing.
                index = int(node.args[1]) - max(1, len(_call(source)[0]._schema.returns))  # type: ignore[arg-type]
                return self.root[bases[index]] if index >= 0 else node
            return self.root[source] if _is_view(source) else node
        return self.root[source] if _is_view(node) and isinstance(source, Node) else node

    def _mark(self) -> None:
        """Find which values are held, and what each is computed from."""
        for node in self.nodes:
            if node.op in _GIVEN:
                self.held.add(node)
            elif node.op == "output" or _is_library(node):
                self.held |= {self.root[n] for n in _arguments(node)}
            is_result = _is_library(node) or (_is_getitem(node) and self.root[node] is node)
            if is_result and isinstance(node.meta.get("val"), Tensor):
                self.held.add(node)
        readers = Counter(
            source
            for node in self.nodes
            if not _is_view(node) and not _is_getitem(node)
            for source in {self.root[n] for n in _arguments(node)}
        )
        for node in self.nodes:
            if node.op != "call_function" or self.root[node] is not node:
                continue
            sources = dict.fromkeys(self.root[n] for n in _arguments(node))
            self.reads[node] = {}
            for source in sources:
                self.reads[node] |= {source: None} if source in self.held else self.reads[source]
            counts = [self.operations[s] for s in sources if s not in self.held]
            self.operations[node] = 1 + sum(counts)
            is_much = len(self.reads[node]) > _FEW_READS or self.operations[node] > _FEW_OPERATIONS
            if _is_reduction(node) or (is_much and readers[node] > 1):
                self.held.add(node)

    def _is_kernel(self, node: Node) -> bool:
        is_own = node.op == "call_function" and self.root.get(node) is node
        return is_own and not _is_getitem(node) and (node in self.held or _is_library(node))

    def _results(self, node: Node) -> list[Node]:
        if isinstance(node.meta.get("val"), Tensor):
            return [node]
        users = [user for user in node.users if _is_getitem(user) and self.root[user] is user]
        return [result for user in users for result in self._results(user)]

    def _kernel(
        self, node: Node, last: dict[Node, Node], kept: set[Node], fixed: set[Node]
    ) -> Kernel:
        results = self._results(node)
        gone = [n for n in self.reads[node] if last[n] is node and n not in kept]
        # What nothing reads is gone at once.
        unread = [n for n in results if n not in last and n not in kept]
        replaced = None
        if not _is_library(node) and not _is_reduction(node):
            mine = (n for n in gone if n not in fixed and _bytes(n) == _bytes(node))
            replaced = next(mine, None)
        touched = [*dict.fromkeys([*self.reads[node], *results])]
        target, arguments = _call(node)
        if target in WRITTEN_OVER:
            touched += [self.root[base] for base in _changed(node)]
        if target in READ_TWICE:
            touched.append(self.root[arguments[READ_TWICE[target]]])
        moved = sum((_size(_bytes(n)) for n in touched), Size())
        return Kernel(
            makes=tuple((n.name, _size(_bytes(n))) for n in results),
            moved=moved,
            replaces=None if replaced is None else replaced.name,
            frees=tuple(n.name for n in [*gone, *unread] if n is not replaced),
            **_work(node),
        )


def _work(node: Node) -> dict[str, Any]:
    """Kind and operations of a kernel."""
    target, arguments = _call(node)
    if target in PRODUCTS:
        shapes = [_shape(n) for n in arguments[PRODUCTS[target] :][:2]]
        kind, flops = product(shapes[0], shapes[1])
        return {"kind": kind, "flops": _size(flops)}
    if target is INT8_PRODUCT:
        left, right, narrow = (arguments[at] for at in (0, 1, 4))
        columns = None if narrow is None else _shape(narrow)
        kind, flops = int8_product(_shape(left), _shape(right), columns)
        return {"kind": kind, "flops": _size(flops)}
    if target in LORA_GRADIENTS:
        dys, lora_b = ([_shape(n) for n in arguments[at]] for at in (0, 2))
        work = _size(lora_gradients_flops(dys, lora_b))
        launches = 2 * len(dys) + LORA_GRADIENTS[target]
        return {"kind": "skinny", "flops": work, "launches": launches}
    if target is BF16_PRODUCT:
        parts, right, narrow, _, is_turned = arguments
        columns = None if narrow is None else _shape(narrow)
        kind, flops = bf16_product(_shape(parts[0]), _shape(right), columns, is_turned)
        return {"kind": kind, "flops": _size(flops)}
    if target in FLASH:
        query, keys = (_shape(n) for n in arguments[FLASH[target] > 1.0 :][:2])
        shape = (query[1], keys[1], query[2])
        return {"kind": "attention", "query": shape, "share": FLASH[target]}
    is_quantizer = getattr(target, "namespace", "") == "bitsandbytes"
    kind = "dequantize" if is_quantizer else "fused"
    return {"kind": kind, "launches": kernels_of(target, arguments)}


def _call(node: Node) -> tuple[Any, list[Any]]:
    """The operator that a node runs and its arguments; some are wrapped in another."""
    target: Any = node.target
    arguments = list(node.args)
    match str(target):
        case "auto_functionalized_v2":
            operator: Any = arguments[0]
            return operator, [node.kwargs.get(one.name) for one in operator._schema.arguments]
        case "run_and_save_rng_state":
            return arguments[0], arguments[1:]
        case "run_with_rng_state":
            return arguments[1], arguments[2:]
        case _:
            return target, arguments


def _arguments(node: Node) -> list[Node]:
    leaves: Sequence[Any] = tree_leaves((node.args, node.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Node)]


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    return math.prod(_shape(node)) * value.element_size() if isinstance(value, Tensor) else 0


def _shape(node: Node) -> list[int]:
    # Numbers may be symbols that stand for the one that was seen.
    return [int(size) for size in node.meta["val"].shape]


def _is_getitem(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _changed(node: Node) -> list[Node]:
    """What an operator that `_is_changed_in_place` changes."""
    bases: Any = node.kwargs["_all_bases"]
    return list(bases)


def _is_changed_in_place(node: Node) -> bool:
    """An operator that changes an argument, which Inductor lets do so."""
    return node.op == "call_function" and str(node.target) == "auto_functionalized_v2"


def _is_view(node: Node) -> bool:
    target: Any = node.target
    return bool(getattr(target, "is_view", False)) or target in _VIEWS


_VIEWS = {
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._reshape_alias.default,
    torch.ops.aten.detach.default,
}


def _is_reduction(node: Node) -> bool:
    return _name(node) in _REDUCTIONS


def _name(node: Node) -> str:
    target: Any = node.target
    return str(getattr(target, "_opname", "")) if node.op == "call_function" else ""


def _is_library(node: Node) -> bool:
    """Run by a kernel of a library, which reads and writes memory; raises for an unknown kind."""
    if node.op != "call_function" or _is_getitem(node):
        return False
    target, _ = _call(node)
    if target in PRODUCTS or target in FLASH:
        return True
    if isinstance(target, torch._ops.HigherOrderOperator):
        raise UnknownOperationError(str(target))
    return getattr(target, "namespace", "") not in ("aten", "prims", "", "_operator")
