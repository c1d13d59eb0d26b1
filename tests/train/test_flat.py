"""Parameters in one flat tensor: same numbers, same checkpoints, one address for ever."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from tunefork.errors import CheckpointError
from tunefork.train.adamw_lora import LoraAdamW

SHAPES = ((6, 5), (7, 1), (1, 300))


def _made() -> tuple[list[nn.Parameter], LoraAdamW]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return parameters, LoraAdamW(parameters, betas=(0.9, 0.99), weight_decay=0.1)


def _loss(parameters: list[nn.Parameter]) -> Tensor:
    return torch.stack([(p**3).sum() for p in parameters]).sum()


def test_it_equals_pytorchs_adamw() -> None:
    """But for the last bit: the end of each tensor that fills no vector has other instructions."""
    parameters, optimizer = _made()
    expected = [nn.Parameter(p.detach().clone()) for p in parameters]
    plain = torch.optim.AdamW(expected, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for _ in range(5):
        for group in (parameters, expected):
            _loss(group).backward()
        optimizer.step(1e-2)
        plain.step()
        plain.zero_grad()
    for parameter, other in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7)
    states = optimizer.state_tensors()
    for index, other in enumerate(expected):
        for name, value in plain.state[other].items():
            torch.testing.assert_close(states[f"{index}.{name}"], value, rtol=1e-6, atol=1e-7)


def test_parameters_and_gradients_lie_in_one_tensor_at_aligned_places() -> None:
    parameters, optimizer = _made()
    values, gradient = optimizer.flat.values, optimizer.flat.gradient
    addresses = [(p.data_ptr(), p.grad.data_ptr()) for p in parameters if p.grad is not None]
    _loss(parameters).backward()
    optimizer.step(1e-2)
    assert addresses == [
        (p.data_ptr(), p.grad.data_ptr()) for p in parameters if p.grad is not None
    ]
    for parameter in parameters:
        assert parameter.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
        assert (parameter.data_ptr() - values.data_ptr()) % 512 == 0
        assert parameter.grad is not None and not parameter.grad.any()
        assert parameter.grad.untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr()
    padding = torch.ones(values.numel(), dtype=torch.bool)
    for span in optimizer.flat.spans:
        padding[span] = False
    assert padding.any() and not values.detach()[padding].any()


def test_a_dropped_gradient_is_made_in_its_place_again() -> None:
    parameters, optimizer = _made()
    views = [p.grad for p in parameters]
    _loss(parameters).backward()
    expected = optimizer.flat.gradient.clone()
    for parameter in parameters:
        parameter.grad = None
    _loss(parameters).backward()
    assert all(p.grad is view for p, view in zip(parameters, views, strict=True))
    assert torch.equal(optimizer.flat.gradient, expected)  # not added to what was there


def test_attaching_takes_another_tensor_in_and_zeros_for_none() -> None:
    parameters, optimizer = _made()
    _loss(parameters).backward()
    kept = optimizer.flat.gradients[2].clone()
    parameters[0].grad, parameters[1].grad = torch.full(SHAPES[0], 2.0), None
    optimizer.attach_gradients()
    assert [p.grad is g for p, g in zip(parameters, optimizer.flat.gradients, strict=True)] == [
        True
    ] * 3
    first, second, third = optimizer.flat.gradients
    assert (first == 2.0).all() and not second.any() and torch.equal(third, kept)


def test_states_of_a_version_before_load_and_unequal_counts_do_not() -> None:
    _, optimizer = _made()
    plain = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    before = torch.optim.AdamW(plain, lr=1e-2, fused=True)
    for p in plain:
        p.grad = torch.randn_like(p)
    before.step()
    saved = {
        f"{index}.{name}": value.clone()
        for index, p in enumerate(plain)
        for name, value in before.state[p].items()
    }
    optimizer.load_state_tensors(saved)
    loaded = optimizer.state_tensors()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    one_less = {name: value for name, value in saved.items() if not name.startswith("1.")}
    optimizer.load_state_tensors(one_less)
    assert not optimizer.state_tensors()["1.exp_avg"].any()
    with pytest.raises(CheckpointError, match=r"updated \[1.0, 2.0\] times"):
        optimizer.load_state_tensors(saved | {"1.step": torch.tensor(2.0)})
    optimizer.load_state_tensors({})
    assert not optimizer.has_states() and optimizer.state_tensors() == {}


def test_a_parameter_that_was_moved_is_noticed() -> None:
    parameters, optimizer = _made()
    parameters[1].data = parameters[1].data.clone()
    with pytest.raises(RuntimeError, match="trained parameter 1 was moved"):
        optimizer.step(1e-2)


def test_the_parameters_do_not_hold_the_optimiser() -> None:
    parameters, optimizer = _made()
    flat = weakref.ref(optimizer.flat)
    del optimizer
    assert flat() is None and parameters[0].grad is not None
