"""Filled-up passes, gradients that stay where they are, and steps laid out ahead."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.model.packed_models import TAKE, made
from tests.train.test_loss import examples
from tunefork.data.bucket import padded, size_of
from tunefork.data.pack import pack
from tunefork.model.head import find_head
from tunefork.train.accumulate import Accumulator
from tunefork.train.runner import Runner, _Graph


def _runner(*, pads: bool = False, captures: bool = False) -> Runner:
    model = made(TAKE["llama"]).train()
    head = replace(find_head(model), takes_segments=True)
    return Runner(model, head, pads=pads, captures=captures)


@pytest.mark.parametrize("captures", [False, True])  # a CPU never does
def test_filled_up_passes_have_the_same_gradient(captures: bool) -> None:
    plain, filled = _runner(), _runner(pads=True, captures=captures)
    [batch] = pack(examples(), max_tokens=64, packing=True)
    for _ in range(1 if captures else 2):  # captured the second time a size comes, on a GPU
        laid = filled.lay_out(batch)
        assert laid.size is not None and laid.supervised == len(batch.labels)
        assert len(laid.batch.labels) > laid.supervised
        want = plain.loss(plain.lay_out(batch), laid.supervised, "")
        got = filled.loss(laid, laid.supervised, "")
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(filled.trained, plain.trained, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_gradients_go_where_the_graphs_add_to_them() -> None:
    runner = _runner()
    runner._attach_gradients()
    first, second = runner.trained[:2]
    kept, other = runner.gradients[:2]
    kept.fill_(3.0)
    first.grad, second.grad = None, torch.full_like(second, 2.0)
    runner._attach_gradients()
    assert first.grad is kept and not kept.any()
    assert second.grad is other and bool((other == 2.0).all())


def test_a_replay_reads_the_batch_and_divisor_that_it_is_given() -> None:
    first, second = (pack(examples(seed=s), max_tokens=64, packing=True)[0] for s in (0, 1))
    size = replace(size_of(first), supervised=192)
    static, other = padded(first, size), padded(second, size)
    seen: list[float] = []
    graph: _Graph = _Graph(
        SimpleNamespace(replay=lambda: seen.append(float(graph.divisor))),
        static,
        torch.tensor(1.0),
        torch.tensor(0.0),
    )
    graph.replay(other, torch.tensor(2.0))
    assert seen == [2.0]
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(getattr(static, name), getattr(other, name))
    assert torch.equal(torch.stack(static.supervised), torch.stack(other.supervised))
    assert torch.equal(static.segments.starts, other.segments.starts)


def _accumulator(limit: int = 24) -> Accumulator:
    return Accumulator(_runner(), limit=limit, packing=True, pad_id=0)


def _ids(batches: list[Any]) -> list[list[int]]:
    return [laid.batch.input_ids.flatten().tolist() for laid in batches]


@pytest.mark.parametrize("change", ["nothing", "limit", "examples"])
def test_a_step_laid_out_ahead_is_that_step(change: str) -> None:
    accumulator, now, following = _accumulator(), examples(seed=1), examples(seed=2)
    accumulator.gradient(now, 1, following)
    assert accumulator._ahead is not None
    ahead = accumulator._ahead[2]
    if change == "limit":
        accumulator.limit = 18
    chosen = examples(seed=3) if change == "examples" else following
    taken = accumulator._take(chosen, accumulator.limit)
    assert (taken is ahead) == (change == "nothing")
    assert _ids(taken) == _ids(_accumulator()._lay_out(chosen, accumulator.limit))
