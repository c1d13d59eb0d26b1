"""Which captured size a pass is filled up to, when it has a graph of its own, and that its gradient
stays the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.model.packed_models import TAKE, made
from tests.tiny import tiny_model
from tests.train.test_loss import examples
from tunefork.data.bucket import Size, size_of
from tunefork.data.pack import MicroBatch, pack
from tunefork.kernels.layout import Storage
from tunefork.model.build import build
from tunefork.model.fused import fuse
from tunefork.model.head import find_head
from tunefork.recipe import LoraSection, Method
from tunefork.train import runner as module
from tunefork.train.nearest_size import most_waiting_tokens, nearest
from tunefork.train.runner import Runner


def _batch(*lengths: int) -> MicroBatch:
    [batch] = pack(examples(lengths), max_tokens=512, packing=True)
    return batch


def _larger(size: Size, **changes: int) -> Size:
    return replace(size, **changes)  # type: ignore[arg-type]


def test_the_least_captured_size_that_holds_it_and_is_near() -> None:
    batch = _batch(60, 50, 40)
    size = size_of(batch)
    assert (size.length, size.longest) == (192, 128)
    near = _larger(size, length=256, segments=16)
    nearer = _larger(size, length=256, segments=16, supervised=size.supervised)
    dearer = _larger(near, supervised=size.supervised + 64)
    far, short = _larger(size, length=320, segments=16), _larger(near, longest=32)
    assert nearest(size, batch, [far, short], 1000) == size
    assert nearest(size, batch, [far, dearer, nearer, short], 1000) == nearer
    assert nearest(size, batch, [_larger(near, segments=2)], 1000) == size  # no room for segments
    many = _larger(near, supervised=2 * size.supervised)
    assert nearest(size, batch, [many], 1000) == size  # the head would take twice as long


def test_not_where_the_gpu_is_the_slower_one_nor_for_whole_rows() -> None:
    batch = _batch(60, 50, 40)
    size = size_of(batch)
    near = _larger(size, length=256, segments=16)
    assert nearest(size, batch, [near], 192) == near
    assert nearest(size, batch, [near], 191) == size
    [row] = pack(examples((128,)), max_tokens=128, packing=True)
    whole = size_of(row)
    assert whole.is_uniform
    assert nearest(whole, row, [_larger(near, longest=128, length=128)], 1000) == whole


def test_weights_count_wherever_they_lie() -> None:
    plain, fused = (made(TAKE["llama"]).bfloat16() for _ in range(2))
    fuse(fused, "bf16", "bf16", torch.device("cpu"))
    assert most_waiting_tokens(plain) == most_waiting_tokens(fused)
    num_weights = sum(p.numel() for p in plain.parameters())
    assert most_waiting_tokens(plain) == int(7.5e11 * len(plain.model.layers) / num_weights)


@pytest.fixture
def runner() -> Runner:
    model = made(TAKE["llama"]).train()
    return Runner(model, replace(find_head(model), takes_segments=True), captures=True)


def test_a_runner_fills_up_to_what_is_captured(runner: Runner) -> None:
    batch = _batch(60, 50, 40)
    size = size_of(batch)
    near = _larger(size, length=256, segments=16)
    assert runner.lay_out(batch).size == size
    runner.graphs = {near: object()}  # type: ignore[dict-item]
    laid = runner.lay_out(batch)
    assert laid.size == near and laid.batch.input_ids.shape == (1, 256)
    plain = Runner(runner.model, runner.head, pads=True)
    want, got = (
        r.forward(r_laid, laid.supervised, "")
        for r, r_laid in ((plain, plain.lay_out(batch)), (plain, laid))
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_bits_that_are_to_be_repeated_hang_on_no_graphs(runner: Runner) -> None:
    batch = _batch(60, 50, 40)
    near = _larger(size_of(batch), length=256, segments=16)
    runner.graphs = {near: object()}  # type: ignore[dict-item]
    torch.use_deterministic_algorithms(True)
    try:
        assert runner.lay_out(batch).size == size_of(batch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert runner.lay_out(batch).size == near


def test_what_comes_often_has_a_graph_of_its_own(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_OFTEN", 3)
    batch = _batch(60, 50, 40)
    size = size_of(batch)
    near: Any = _larger(size, length=256, segments=16)
    runner.graphs = {near: object()}  # type: ignore[dict-item]
    assert [runner.lay_out(batch).size for _ in range(5)] == [near] * 3 + [size] * 2
    more = {_larger(near, supervised=64 * at): object() for at in range(20, 36)}
    runner.graphs |= more  # type: ignore[arg-type]
    assert runner.lay_out(batch).size == near  # no room for another graph
    runner.graphs[size] = object()  # type: ignore[assignment]
    assert runner.lay_out(batch).size == size


def test_a_model_without_decoder_layers_is_never_waited_for() -> None:
    model = tiny_model("llama")
    model.model.layers = torch.nn.ModuleList()
    assert most_waiting_tokens(model) == 0


@pytest.mark.parametrize(
    ("method", "form"), [(Method.FULL, None), (Method.LORA, None), (Method.QLORA, "nf4")]
)
def test_a_pass_that_was_laid_out_for_a_graph_that_is_gone(
    method: Method, form: Storage | None
) -> None:
    """It is launched, filled up to that graph's size; loss and gradients are the pass's own."""
    model = made(TAKE["llama"]).train()
    if form is not None:
        model = model.bfloat16()
    build(model, method, LoraSection(rank=4), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    if form is not None:
        fuse(model, form, "bf16", torch.device("cpu"))
    head = replace(find_head(model), takes_segments=True)
    batch, found = _batch(60, 50, 40), []
    near = _larger(size_of(batch), length=256, segments=16, supervised=128)
    for graphs in ({}, {near: object()}):
        runner = Runner(model, head, pads=True)
        runner.graphs = graphs  # type: ignore[assignment]
        laid = runner.lay_out(batch)
        assert laid.size == (near if graphs else size_of(batch))
        assert laid.supervised == len(batch.labels) < len(laid.batch.labels)
        runner.drop_graphs()
        model.zero_grad()
        loss = runner.loss(laid, laid.supervised, "")
        assert runner.seen == {laid.size}
        gradients = [p.grad.float().flatten() for p in runner.trained if p.grad is not None]
        assert len(gradients) == len(runner.trained)
        found.append((loss, torch.cat(gradients)))
    (want, expected), (got, by_filled) = found
    precision = 1e-6 if form is None else 2**-7
    torch.testing.assert_close(got, want, rtol=precision, atol=precision)
    assert expected.norm() > 0
    assert (by_filled - expected).norm() <= 4 * precision * expected.norm()
