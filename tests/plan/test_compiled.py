"""Compiled layers: captured once, replayed for any number of tokens, and the same as measured."""

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig

from tunefork.data.bucket import padded, size_of
from tunefork.data.example import Encoded
from tunefork.data.pack import pack
from tunefork.model.layers import decoder_layers
from tunefork.plan import step as steps
from tunefork.plan.attention import Setting, install
from tunefork.plan.batches import shape_of
from tunefork.plan.built import Build, built
from tunefork.plan.capture import capture
from tunefork.plan.compiled import EmptyShelf
from tunefork.plan.graph import TOKENS, program_of
from tunefork.plan.passes import Shape
from tunefork.plan.shape import at_depth, config_for
from tunefork.plan.step import trace_step
from tunefork.plan.trace import Trace
from tunefork.recipe import Checkpointing, FullSection, LoraSection, Method

GIB = 2**30
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SHAPE = Shape(2, 128, 200, is_masked=False)


def _build(method: Method = Method.LORA, checkpointing: Checkpointing = "none", **more: Any) -> Any:
    return Build(
        method=method,
        lora=LoraSection(rank=more.pop("rank", 4)),
        full=FullSection(),
        dtype=torch.bfloat16,
        checkpointing=checkpointing,
        device="cuda",
        **{"is_compiled": True, **more},
    )


def test_a_second_run_counts_what_it_makes() -> None:
    """Not the MLP's last product, nor attention where its result was kept."""
    config = at_depth(CONFIG, 2)

    def work(checkpointing: Checkpointing, kind: str, **more: Any) -> float:
        done = trace_step(config, _build(checkpointing=checkpointing, **more), SHAPE).work
        return float(
            sum(w.flops for k, w in done.items() if (k == "attention") == (kind == "attention"))
        )

    assert work("offload", "attention") == work("none", "attention")
    assert work("full", "attention") == pytest.approx(work("none", "attention") * 4.5 / 3.5)
    products = [work(kind, "products", is_compiled=False) for kind in ("none", "full")]
    # Layers x 2 operations x tokens x (W + B, filled up to 8 columns).
    down = 2 * 2 * (2 * 128) * (64 * 160 + 8 * 64)
    for kind in ("full", "offload"):
        assert work(kind, "products") - work("none", "products") == products[1] - products[0] - down


def test_offloaded_layers_are_planned_as_the_shelf_has_them() -> None:
    """Two layers' tensors on their way out, the next one's on its way back."""
    shelf = EmptyShelf()
    tickets = [shelf.put(torch.empty(4, 8, device="meta")) for _ in range(5)]
    for at, here in ((4, (0, 0, 0, 1)), (3, (0, 0, 1)), (2, (0, 1)), (1, (1,))):
        shelf.take(tickets[at])
        assert tuple(isinstance(ticket[0], torch.Tensor) for ticket in tickets[:at]) == here


@pytest.mark.parametrize(
    "made",
    [
        _build(Method.FULL),
        pytest.param(
            _build(is_compiled=False, checkpointing="offload", wants_int8=True),
            marks=pytest.mark.slow,
        ),
        pytest.param(_build(), marks=pytest.mark.slow),
        pytest.param(_build(checkpointing="full", wants_int8=True), marks=pytest.mark.slow),
        pytest.param(_build(checkpointing="selective"), marks=pytest.mark.slow),
        pytest.param(_build(Method.QLORA, "offload", wants_int8=True), marks=pytest.mark.slow),
    ],
    ids=["all", "offload-eager", "bf16", "int8-full", "selective", "nf4-int8-offload"],
)
def test_two_depths_extrapolate_to_the_whole(made: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[Any] = []

    def once(model: Any, within: Checkpointing, **more: Any) -> list[Any]:
        # Among cuts that keep as much the partitioner does not choose the same one each time.
        if not known:
            known.extend(capture(model, within, **more) or [])
        return known[:1] * len(decoder_layers(model))

    monkeypatch.setattr(steps, "capture", once)
    monkeypatch.setattr(steps, "_CAPTURED", {})
    monkeypatch.setattr(steps, "_TRACED", {})
    found = trace_step(CONFIG, made, SHAPE)
    assert found.is_compiled == made.is_compiled and not found.is_masked
    monkeypatch.setattr(steps, "depths", lambda _: (7, 7))
    monkeypatch.setattr(steps, "at_depth", lambda config, _: config)
    monkeypatch.setattr(steps, "_TRACED", {})
    whole = trace_step(CONFIG, made, SHAPE)
    assert {n: p.total for n, p in found.peaks.items()} == {
        n: p.total for n, p in whole.peaks.items()
    }
    assert found.static == whole.static
    for kind, work in whole.work.items():
        assert found.work[kind].count == work.count, kind
        assert found.work[kind].flops == pytest.approx(work.flops, rel=1e-6), kind


def test_a_compiled_layer_keeps_less_than_one_as_written() -> None:
    shape = Shape(16, 1024, 16_000, is_masked=False)
    compiled, written = (
        trace_step(CONFIG, _build(is_compiled=is_compiled), shape).peak.parts["activations"]
        for is_compiled in (True, False)
    )
    assert 0.5 * written < compiled < 0.95 * written


def test_only_what_is_read_by_a_product_or_leaves_is_held() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        scaled = (x * 2).exp() + 1  # computed on the way into the product, which reads memory
        return ((scaled @ w).relu() * 3,)

    x = torch.empty(TOKENS, 8, device="meta")
    graph = make_fx(function)(x, torch.empty(8, 16, device="meta"))
    program = program_of(graph)
    product, after = program.kernels[1:]
    assert len(program.kernels) == 3
    assert [size(10) for _, size in program.kernels[0].makes] == [10 * 8 * 4]
    assert (product.kind, product.flops(10)) == ("skinny", 2 * 10 * 8 * 16)
    assert program.kernels[0].makes[0][0] in product.frees
    assert after.replaces == product.makes[0][0]  # elementwise, so it takes the product's place
    assert after.moved(10) == 2 * 10 * 16 * 4


def test_capturing_leaves_the_model_as_it_was() -> None:
    install(Setting("cuda", is_masked=False), Trace())
    there = built(at_depth(CONFIG, 4), _build())
    layers = capture(there.model, "none")
    assert layers is not None and len(layers) == 4 and layers[0] == layers[3]
    assert all("forward" not in vars(layer) for layer in decoder_layers(there.model))
    assert all(p.grad is None for p in there.model.parameters())


@pytest.mark.parametrize("lengths", [[128, 128], [40, 90, 33, 7], [64, 64]])
@pytest.mark.parametrize("packing", [True, False])
def test_a_compiled_pass_is_filled_up_as_the_run_fills_it(
    lengths: list[int], packing: bool
) -> None:
    import numpy as np

    examples = [Encoded("-", np.arange(n, dtype=np.int32), np.ones(n, np.bool_)) for n in lengths]
    for batch in pack(examples, max_tokens=256, packing=packing):
        run = padded(batch, size_of(batch))
        planned = shape_of(batch).padded()
        assert (planned.rows, planned.length) == tuple(run.input_ids.shape)
        assert planned.supervised == len(run.labels)
        assert planned.attended == sum(n * n for n in batch.segments.starts.diff().tolist())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "checkpointing", "wants_int8", "rows", "length", "measured", "within"),
    [
        (Method.LORA, "none", False, 8, 2048, 76.4, 0.01),
        (Method.LORA, "none", True, 8, 2048, 70.21, 0.01),
        (Method.LORA, "full", True, 8, 2048, 16.29, 0.01),
        (Method.QLORA, "offload", True, 8, 2048, 9.05, 0.05),
    ],
)
def test_an_8b_shape_takes_what_it_took_on_an_h200(
    method: Method,
    checkpointing: Checkpointing,
    wants_int8: bool,
    rows: int,
    length: int,
    measured: float,
    within: float,
) -> None:
    """Rank 16 on all linear layers; `torch.cuda.max_memory_allocated` of 2026-11-27 and, in int8,
    of 2026-11-28."""
    made = _build(method, checkpointing=checkpointing, wants_int8=wants_int8, rank=16)
    step = trace_step(config_for(8.03e9), made, Shape(rows, length, rows * length, False))
    assert step.peak.total / GIB == pytest.approx(measured, rel=within)
