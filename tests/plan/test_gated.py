"""SwiGLU beside `down`'s u and A's gradient, as a plan counts it: h is made, and not kept; dh is
written over."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig

from tunefork.kernels.compiled import standing_for_gpu
from tunefork.kernels.gated import gated_down, gated_gradients, gated_gradients_and_maxima
from tunefork.kernels.int8_gradients import gradient_codes
from tunefork.model import layers
from tunefork.plan.attention import Setting, install
from tunefork.plan.built import Build, built
from tunefork.plan.capture import capture
from tunefork.plan.graph import TOKENS, program_of
from tunefork.plan.one_pass import trace_pass
from tunefork.plan.passes import Shape
from tunefork.plan.step import trace_step
from tunefork.plan.trace import Trace
from tunefork.recipe import FullSection, LoraSection, Method

INNER, RANK, LAYERS = 160, 4, 2
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def _build(is_compiled: bool, method: Method = Method.LORA, wants_int8: bool = False) -> Build:
    return Build(
        method=method,
        lora=LoraSection(rank=RANK),
        full=FullSection(),
        dtype=torch.bfloat16,
        checkpointing="none",
        device="cuda",
        is_compiled=is_compiled,
        wants_int8=wants_int8,
    )


def _operands(tokens: int) -> list[torch.Tensor]:
    shapes = [*[(tokens, INNER)] * 3, (tokens, RANK), (RANK, INNER)]
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


def _both(gate: Any, up: Any, dh: Any, du: Any, a: Any) -> tuple[torch.Tensor, ...]:
    with standing_for_gpu(lambda *_: None):
        return *gated_down(gate, up, a), *gated_gradients(gate, up, dh, du)


def _graph(function: Callable[..., Any], operands: list[torch.Tensor]) -> GraphModule:
    """As a compiler has it: what is written over is a new tensor."""
    graph: GraphModule = make_fx(dispatch_functionalize(function))(*operands)
    return graph


def _bytes(tokens: int) -> int:
    """Three tensors there, five back; u and du; A and its gradient; two bytes a number."""
    return 2 * (8 * tokens * INNER + 2 * tokens * RANK + 2 * RANK * INNER)


def test_launched_each_reads_and_writes_once() -> None:
    operands = _operands(100)
    with Trace() as trace:
        _both(*operands)
    work = trace.work.pop("memory")
    assert not trace.work
    assert (work.count, work.num_bytes) == (2, _bytes(100))


def test_compiled_they_are_two_operations() -> None:
    program = program_of(_graph(_both, _operands(TOKENS)))
    kernels, dh = program.kernels, program.inputs[2]
    # dup lies where dh was.
    assert [(kernel.kind, len(kernel.makes)) for kernel in kernels] == [("fused", 2), ("fused", 2)]
    assert program.outputs.count(dh) == 1 and dh not in kernels[1].frees
    assert sum(kernel.moved(100) for kernel in kernels) == _bytes(100)


def _in_int8(gate: Any, up: Any, dh: Any, du: Any, b: Any, fold: Any) -> tuple[Any, ...]:
    with standing_for_gpu(lambda *_: None):
        *dys, da, most = gated_gradients_and_maxima(gate, up, dh, du, fold)
        u, lora_b = torch.empty_like(du).repeat(1, 2), [b, b]
        codes, scale, du, db = gradient_codes(dys, u, lora_b, 0.5, fold, most)
        return da, codes, scale, du, *db


@pytest.mark.parametrize("is_compiled", [False, True])
def test_in_int8_each_too(is_compiled: bool) -> None:
    tokens = TOKENS if is_compiled else 100
    operands = [*_operands(tokens)[:4], torch.empty(INNER, RANK, dtype=torch.bfloat16)]
    operands.append(torch.empty(1, 2 * INNER))
    operands = [x.to("meta") for x in operands]
    fold, column = 4 * 2 * INNER, 4 * tokens
    gated = 2 * (5 * tokens * INNER + tokens * RANK + RANK * INNER) + fold + column
    # dgate and dup; u and du of both; one B twice, and two gradients; maxima, scales; codes.
    skinny = 2 * (2 * tokens * INNER + 4 * tokens * RANK + 3 * INNER * RANK)
    skinny += fold + 2 * column + tokens * 2 * INNER
    flops = 2 * 4.0 * tokens * INNER * RANK
    if is_compiled:
        first, *_, last = program_of(_graph(_in_int8, operands)).kernels
        assert (first.kind, len(first.makes), first.moved(tokens)) == ("fused", 3, gated)
        assert (last.kind, last.launches) == ("skinny", 7)
        assert (last.flops(tokens), last.moved(tokens)) == (flops, skinny)
    else:
        with Trace() as trace:
            _in_int8(*operands)
        work, repeats = trace.work["skinny"], 2 * 3 * tokens * RANK
        assert (work.flops, work.num_bytes, work.count) == (flops, skinny, 7)
        assert trace.work["memory"].num_bytes == pytest.approx(gated + repeats, rel=0.01)


@pytest.mark.parametrize("wants_int8", [False, True])
@pytest.mark.parametrize(
    "method", [Method.LORA, pytest.param(Method.QLORA, marks=pytest.mark.slow)]
)
def test_a_compiled_layer_does_not_keep_h(
    method: Method, wants_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up are kept; before, a third tensor of their size was."""
    install(Setting("cuda", is_masked=False), Trace())
    kept = []
    for is_gated in (True, False):
        if not is_gated:
            monkeypatch.setattr(layers, "prepare_gated", lambda _: [])
        # A model of its own: the other's MLPs have been prepared.
        monkeypatch.setattr("tunefork.plan.built._BUILT", {})
        found = capture(built(CONFIG, _build(True, method, wants_int8)).model, "none")
        assert found is not None and len(found) == LAYERS
        program, results = found[0].forward, found[0].num_results
        sizes = [program.sizes[name].per_token for name in program.outputs[results:] if name]
        kept.append(sum(size == 2 * INNER for size in sizes))
    # Gate and up are views of one product.
    assert kept == [0, 1]


@pytest.mark.parametrize("wants_int8", [False, True])
def test_nor_does_one_as_written(wants_int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(4, 1024, 4000, is_masked=False)
    made, peaks = _build(False, wants_int8=wants_int8), []
    for is_gated in (True, False):
        with monkeypatch.context() as patch:
            if not is_gated:
                patch.setattr(layers, "prepare_gated", lambda _: [])
            patch.setattr("tunefork.plan.built._BUILT", {})
            step = trace_pass(CONFIG, made, shape, None)
        peaks.append(step.peaks["forward: head"].total)
    joint = trace_pass(CONFIG, replace(made, is_joint=True), shape, None)
    # Nor are adapters that train together built so.
    assert joint.peaks["forward: head"].total == peaks[1]
    # As written silu of the gate is kept too.
    assert peaks[1] - peaks[0] == pytest.approx(2 * LAYERS * 4 * 1024 * INNER * 2, rel=0.02)


@pytest.mark.parametrize("wants_int8", [pytest.param(False, marks=pytest.mark.slow), True])
def test_with_checkpointing_it_takes_no_more_than_as_written(
    wants_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An 8B model's 16,384 tokens, GiB: a new tensor for dup would be 0.44 more."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    made, peaks = replace(_build(True, wants_int8=wants_int8), checkpointing="full"), []
    for is_gated in (True, False):
        with monkeypatch.context() as patch:
            if not is_gated:
                patch.setattr(layers, "prepare_gated", lambda _: [])
            patch.setattr("tunefork.plan.built._BUILT", {})
            for found in ("_TRACED", "_CAPTURED"):
                patch.setattr(f"tunefork.plan.step.{found}", {})
            patch.setattr("tunefork.plan.step.remembered", lambda *given: given[-1]())
            step = trace_step(config, made, Shape(8, 2048, 16_384, is_masked=False))
        assert step.is_compiled
        peaks.append(step.peak.total / 2**30)
    assert peaks[0] < peaks[1] + 0.05
    if not wants_int8:
        assert peaks[0] == pytest.approx(peaks[1], abs=0.05)
