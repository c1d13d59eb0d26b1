"""A graph that cannot be captured is done without, and gradients stay where graphs add to them."""

from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tests.train.test_loss import examples
from tunefork.data.bucket import size_of
from tunefork.data.pack import pack
from tunefork.errors import NoMemoryError
from tunefork.model.head import find_head
from tunefork.train.accumulate import Accumulator
from tunefork.train.runner import Laid, Runner


def _runner() -> tuple[Runner, Laid]:
    model = tiny_model("llama").train().requires_grad_(True)
    [batch] = pack(examples((9, 4)), max_tokens=64, packing=True)
    runner = Runner(model, find_head(model), captures=True)
    # As it is: a CPU takes no segments, and filled up it would see others.
    return runner, Laid(batch, len(batch.labels), size_of(batch))


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("CUDA")]
)
def test_a_capture_that_fails_leaves_the_pass_to_be_launched(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, laid = _runner()
    tries: list[int] = []

    def fail(_batch: Any) -> Any:
        tries.append(1)
        raise error

    monkeypatch.setattr(runner, "_may_capture", lambda _size: runner.captures)
    monkeypatch.setattr(runner, "_capture", fail)
    with pytest.warns(UserWarning, match=r"train\.compile: .*(not permitted|CUDA)") as said:
        losses = [float(runner.loss(laid, laid.supervised, "here")) for _ in range(3)]
    assert len(said) == 1
    assert losses[0] == losses[1] == losses[2]
    assert tries == [1]


def test_a_launched_pass_adds_to_the_gradients_that_graphs_add_to() -> None:
    runner, laid = _runner()
    runner._attach_gradients()  # as a capture does
    kept = [gradient.data_ptr() for gradient in runner.gradients]
    for parameter in runner.trained:  # as an optimiser does that frees them
        parameter.grad = None
    runner.loss(laid, laid.supervised, "here")
    assert [p.grad.data_ptr() for p in runner.trained if p.grad is not None] == kept


def test_want_of_memory_gives_the_graphs_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, laid = _runner()
    runner._attach_gradients()
    runner.graphs = {laid.size: object()}  # type: ignore[dict-item]
    tries: list[dict[Any, Any]] = []

    def loss(_laid: Laid, _supervised: int, _where: str) -> torch.Tensor:
        tries.append(dict(runner.graphs))
        if len(tries) == 1:
            raise NoMemoryError("the first")
        return torch.ones(())

    monkeypatch.setattr(runner, "pads", False)
    monkeypatch.setattr(runner, "loss", loss)
    cut = Accumulator(runner, 64, packing=True, pad_id=0, on_out_of_memory="shrink")
    cut.gradient(examples((9, 4)), 1)
    assert tries[0]
    assert not any(tries[1:])
    assert runner.gradients == []
