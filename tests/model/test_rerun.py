"""Inputs that leave for host memory come back, and abandoned ones do not pile up."""

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from tunefork.model.rerun import plainly, rerun
from tunefork.model.shelf import Held, Shelf


def _run(layer: nn.Module, x: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.tanh(layer(x))


def _pass(layers: list[nn.Linear], shelf: Shelf | Held | None, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = _run(layer, x) if shelf is None else rerun(*plainly(_run), shelf, False, layer, x)
    return x.square().sum()


def _layers() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(8, 8) for _ in range(3)]


def test_gradients_are_the_same_and_buffers_used_again() -> None:
    layers, x, shelf = _layers(), torch.randn(4, 8), Shelf()
    expected = torch.autograd.grad(_pass(layers, None, x), [m.weight for m in layers])
    addresses = []
    for _ in range(2):
        _pass(layers, shelf, x).backward()
        assert shelf.kept == []
        addresses.append(sorted(buffer.data_ptr() for buffer in shelf.free))
    assert addresses[0] == addresses[1] and len(addresses[0]) == 3
    for layer, want in zip(layers, expected, strict=True):
        assert layer.weight.grad is not None
        torch.testing.assert_close(layer.weight.grad, 2 * want)


def test_nothing_of_a_pass_outlives_its_backward_pass() -> None:
    layers, shelf = _layers(), Shelf()
    loss = _pass(layers, shelf, torch.randn(4, 8))
    held = [weakref.ref(kept.holder()) for kept in shelf.kept if kept.holder is not None]
    loss.backward()
    del loss
    assert len(held) == 3 and all(reference() is None for reference in held)


def test_passes_without_a_backward_pass_neither_pile_up_nor_mix() -> None:
    layers, shelf, x = _layers(), Shelf(), torch.randn(4, 8)
    for _ in range(3):
        _pass(layers, shelf, torch.randn(4, 8))
        assert len(shelf.kept) == 3
    expected = torch.autograd.grad(_pass(layers, None, x), [m.weight for m in layers])
    _pass(layers, shelf, x).backward()
    assert shelf.kept == [] and len(shelf.free) == 3
    for layer, want in zip(layers, expected, strict=True):
        assert layer.weight.grad is not None
        torch.testing.assert_close(layer.weight.grad, want)


def test_layers_below_the_first_that_is_trained_keep_nothing() -> None:
    layers, shelf, x = _layers(), Shelf(), torch.randn(4, 8)
    layers[0].requires_grad_(False)
    (want,) = torch.autograd.grad(_pass(layers, None, x), [layers[1].weight])
    loss = _pass(layers, shelf, x)
    assert len(shelf.kept) == 2
    loss.backward()
    assert layers[0].weight.grad is None and layers[1].weight.grad is not None
    torch.testing.assert_close(layers[1].weight.grad, want)


@pytest.mark.parametrize("shelf", [Held(), Shelf()])
def test_passes_whose_backward_passes_come_later_are_kept_apart(shelf: Held | Shelf) -> None:
    layers, x = _layers(), torch.randn(4, 8)
    both = _pass(layers, None, x) + _pass(layers, None, 2 * x)
    expected = torch.autograd.grad(both, [m.weight for m in layers])
    for loss in [_pass(layers, shelf, x), _pass(layers, shelf, 2 * x)]:  # the first one's first
        loss.backward()
    for layer, want in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.weight.grad, want)


def test_a_second_backward_pass_is_refused() -> None:
    loss = _pass(_layers(), Held(), torch.randn(4, 8))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has one backward pass"):
        loss.backward()


def test_a_second_run_that_fails_leaves_random_numbers_as_they_are() -> None:
    def run(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise MemoryError
        return torch.dropout(layer(x), 0.5, train=True)

    loss = rerun(*plainly(run), Held(), True, nn.Linear(8, 8), torch.randn(4, 8)).sum()
    state = torch.get_rng_state()
    with pytest.raises(MemoryError):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
