"""A graph that cannot be captured is done without, and gradients stay where graphs add to them."""

from dataclasses import replace
from types import SimpleNamespace
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


def test_a_pass_without_memory_beside_graphs_is_launched_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a step may not be cut smaller: a plan counts no second pass's activations."""
    runner, laid = _runner()
    runner.graphs = {laid.size: object()}  # type: ignore[dict-item]
    tries: list[int] = []

    def loss(laid: Laid, _supervised: int, _where: str) -> torch.Tensor:
        tries.append(laid.batch.input_ids.numel())
        if runner.graphs or len(tries) > 2:
            raise NoMemoryError("beside graphs, or the third")
        return torch.ones(())

    monkeypatch.setattr(runner, "pads", False)
    monkeypatch.setattr(runner, "loss", loss)
    whole = Accumulator(runner, 64, packing=True, pad_id=0)
    with pytest.warns(UserWarning, match=r"train\.compile: .* beside captured ones"):
        whole.gradient(examples((9, 4)), 1)
    assert tries == [13, 13] and whole.limit == 64
    assert not runner.captures and not runner.graphs
    with pytest.raises(NoMemoryError, match="the third"):
        whole.gradient(examples((9, 4)), 1)


class _Memory:
    """A GPU's, in bytes, as `torch.cuda` tells it; a captured pass keeps what its tokens need."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runner: Runner, free: int) -> None:
        self.runner, self.free, self.captured = runner, free, list[int]()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (self.free - self.pool, 0))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: self.pool)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: max(self.launched))
        monkeypatch.setattr(runner, "_capture", self.capture)
        monkeypatch.setattr(runner, "forward", self.launch)
        monkeypatch.setattr(runner, "backward", lambda _loss, _where: None)
        self.launched: list[int] = []

    @property
    def pool(self) -> int:
        return max((size.length for size in self.runner.graphs), default=0)

    def launch(self, laid: Laid, _divisor: Any, _where: str) -> torch.Tensor:
        assert laid.size is not None
        self.launched.append(laid.size.length)
        return torch.ones(())

    def capture(self, batch: Any) -> Any:
        self.captured.append(batch)
        return SimpleNamespace(replay=lambda _batch, _divisor: torch.zeros(()))

    def run(self, *lengths: int) -> list[bool]:
        """Which passes, each of a length, were replayed."""
        laid = _runner()[1]
        assert laid.size is not None
        sizes = [replace(laid.size, rows=1, length=length) for length in lengths]
        batches = [Laid(length, 1, size) for length, size in zip(lengths, sizes, strict=True)]  # type: ignore[arg-type]
        return [not float(self.runner.loss(batch, 1, "here")) for batch in batches]


def test_a_larger_pass_takes_the_place_of_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = _runner()
    memory = _Memory(monkeypatch, runner, free=6000)
    assert memory.run(3840, 3840, 4096) == [False, True, False]
    assert memory.run(4096, 3840, 128, 128, 3840) == [True, True, False, True, True]
    assert memory.captured == [3840, 4096, 3840, 128]
    assert {size.length for size in runner.graphs} == {3840, 4096, 128}


def test_a_larger_pass_that_memory_would_not_hold_is_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner, _ = _runner()
    memory = _Memory(monkeypatch, runner, free=5000)
    assert memory.run(3840, 3840, 4096, 4096, 3840) == [False, True, False, False, True]
    assert memory.captured == [3840]


def test_sizes_that_grow_on_and_on_are_captured_a_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner, _ = _runner()
    memory = _Memory(monkeypatch, runner, free=10**6)
    for length in range(64, 64 * 20, 64):
        memory.run(length, length)
    assert memory.captured == [64 * (n + 1) for n in range(8)]
    assert memory.run(512) == [True]
    runner.drop_graphs()  # as where memory is short: a smaller pass comes
    assert memory.run(64, 64) == [True, True]
    assert len(memory.captured) == 9


def test_memory_is_not_taken_from_under_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, laid = _runner()
    waited: list[bool] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: waited.append(bool(runner.graphs)))
    runner.model = SimpleNamespace(device=torch.device("cuda"))
    runner.drop_graphs()
    assert waited == []
    runner.graphs = {laid.size: object()}  # type: ignore[dict-item]
    runner.drop_graphs()
    assert waited == [True] and not runner.graphs
