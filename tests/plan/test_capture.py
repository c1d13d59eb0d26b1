"""A layer's graphs by the partitioner alone are those that torch.compile makes of it."""

import copy
import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from tunefork.plan import capture as capturing
from tunefork.plan.attention import Setting, install
from tunefork.plan.built import Build, built
from tunefork.plan.graph import UnknownOperationError
from tunefork.plan.program import Kernel, Program
from tunefork.plan.recorded import joint_graph
from tunefork.plan.trace import Trace
from tunefork.recipe import FullSection, LoraSection, Method

_SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _programs(program: Program) -> list[Any]:
    """Without the names, which follow the order of the inputs."""
    return [_unnamed(kernel) for kernel in program.kernels]


def _unnamed(kernel: Kernel) -> Any:
    sizes = tuple(size for _, size in kernel.makes)
    plain = replace(kernel, makes=(), replaces=None, frees=())
    return plain, sizes, kernel.replaces is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**_SHAPE), Qwen3Config(**_SHAPE, head_dim=16)],
    ids=["llama", "qwen3"],
)
@pytest.mark.parametrize(
    ("method", "int8"),
    [
        (Method.LORA, False),
        (Method.LORA, True),
        (Method.QLORA, False),
        (Method.QLORA, True),
        (Method.FULL, False),
    ],
)
def test_both_ways_lead_to_the_same_programs(
    config: PretrainedConfig, method: Method, int8: bool
) -> None:
    install(Setting("cuda", is_masked=False), Trace())
    made = Build(
        method=method,
        lora=LoraSection(rank=4),
        full=FullSection(),
        dtype=torch.bfloat16,
        checkpointing="none",
        device="cuda",
        wants_int8=int8,
        is_compiled=True,
    )
    model = built(copy.deepcopy(config), made).model
    compiled, traced = capturing._compiled(model, "none"), capturing._traced(model)
    assert compiled is not None and traced is not None and len(traced) == len(compiled) == 2
    for ours, theirs in zip(traced, compiled, strict=True):
        assert _programs(ours.forward) == _programs(theirs.forward)
        assert _programs(ours.backward) == _programs(theirs.backward)


def test_layers_that_are_alike_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    trace_layer = capturing._trace_layer

    def counting(*args: Any) -> Any:
        traced.append(args[1])
        return trace_layer(*args)

    monkeypatch.setattr(capturing, "_trace_layer", counting)
    install(Setting("cuda", is_masked=False), Trace())
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    fields = _SHAPE | {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 8}
    config = Qwen3Config(**fields, head_dim=16, use_sliding_window=True)
    made = Build(
        method=Method.FULL,
        lora=LoraSection(),
        full=FullSection(),
        dtype=torch.bfloat16,
        checkpointing="none",
        device="cuda",
    )
    found = capturing._traced(built(config, made).model)
    assert found is not None and len(found) == 4
    assert len(traced) == 2 and found[0] is found[2] and found[1] is found[3]


def test_what_changes_a_tensor_in_place_is_not_recorded_as_if_it_did_not() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.add_(x)
        return y

    x = torch.empty(4, device="meta", requires_grad=True)
    with pytest.raises(UnknownOperationError, match=r"add_"):
        joint_graph(function, [x], {})


def test_what_is_written_over_a_part_gives_the_whole_tensor_anew() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x @ w
            torch.ops.tunefork.gated_gradients(x[:, :2], x[:, :2], y[:, :2], x[:, :1])
        return (y * x).sum()

    x = torch.empty(4, 3, device="meta", requires_grad=True)
    graph = joint_graph(function, [x, torch.empty(3, 3, device="meta")], {}).graph
    (product,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    *_, after = graph.find_nodes(op="call_function", target=operator.getitem)
    (times,) = [node for node in after.users if node.meta.get("partitioner_tag") is None]
    assert after.args[0].kwargs["_all_bases"] == [product] and times.args[0] is after


def test_views_of_one_constant_are_constants() -> None:
    seeds = torch.empty(2, 4, device="meta")
    graph = joint_graph(
        lambda x: x * seeds[0] + x * seeds[1],
        [torch.empty(4, device="meta", requires_grad=True)],
        {},
    ).graph
    assert len(graph.find_nodes(op="get_attr")) == 1

    views = [seeds[0], seeds[1]]
    graph = joint_graph(
        lambda x: x * views[0] + x * views[1],
        [torch.empty(4, device="meta", requires_grad=True)],
        {},
    ).graph
    assert len(graph.find_nodes(op="get_attr")) == 2


def test_a_view_of_a_constant_that_was_changed_in_place_is_none() -> None:
    held = torch.empty(3, 3, device="meta")
    views = [held[:, :2], held[:, 1:]]

    def function(x: torch.Tensor) -> torch.Tensor:
        before = (x @ views[0]).sum()
        with torch.no_grad():
            torch.ops.tunefork.gated_gradients(x[:, :2], x[:, :2], views[0], x[:, :1])
        return before + (x @ views[1]).sum()

    x = torch.empty(3, 3, device="meta", requires_grad=True)
    with pytest.raises(UnknownOperationError, match="changed in place"):
        joint_graph(function, [x], {})
