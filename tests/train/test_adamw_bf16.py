"""The optimiser around the bf16 kernel: its states, what it refuses, what it leaves."""

import pytest
import torch
from torch import nn

from tunefork.errors import CheckpointError, RecipeError
from tunefork.recipe import DataSection, FullSection, Method, ModelSection, Recipe
from tunefork.recipe_file import parse
from tunefork.train.adamw_bf16 import Bf16AdamW
from tunefork.train.method import make_optimizer


def _made(seed: int = 0) -> tuple[list[nn.Parameter], Bf16AdamW]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s).bfloat16()) for s in ((40, 30), (70,), (8, 8))]
    return parameters, Bf16AdamW(parameters, betas=(0.9, 0.999), weight_decay=0.1, seed=seed)


def _step(parameters: list[nn.Parameter], optimizer: Bf16AdamW, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step(1e-2)
    assert all(p.grad is None for p in parameters)


def _bits(parameters: list[nn.Parameter], optimizer: Bf16AdamW) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters] + [
        value.clone() for _, value in sorted(optimizer.state_tensors().items())
    ]


def test_states_go_round_and_a_resumed_run_has_the_same_bits() -> None:
    parameters, optimizer = _made()
    for number in range(3):
        _step(parameters, optimizer, number)
    saved = {name: value.clone() for name, value in optimizer.state_tensors().items()}
    weights = [p.detach().clone() for p in parameters]
    _step(parameters, optimizer, 3)
    resumed, other = _made()
    other.load_state_tensors(saved)
    with torch.no_grad():
        for parameter, weight in zip(resumed, weights, strict=True):
            parameter.copy_(weight)
    _step(resumed, other, 3)
    pairs = zip(_bits(parameters, optimizer), _bits(resumed, other), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    another, third = _made(seed=1)
    third.load_state_tensors(saved)
    with torch.no_grad():
        for parameter, weight in zip(another, weights, strict=True):
            parameter.copy_(weight)
    _step(another, third, 3)
    assert not torch.equal(another[0], resumed[0])  # the bits hang on the seed


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    parameters, optimizer = _made()
    _step(parameters, optimizer, 0)
    good = dict(optimizer.state_tensors())
    before = _bits(parameters, optimizer)
    wrong = {
        "step is": good | {"0.step": torch.tensor(1.0)},
        "exp_avg is": good | {"0.exp_avg": good["0.exp_avg"].float()},
        "lacks exp_avg_sq": {k: v for k, v in good.items() if k != "1.exp_avg_sq"},
        "has 3, and this run trains 3": good | {"3.step": torch.tensor(1)},
        "has generator": good | {"generator.cpu": torch.get_rng_state()},
    }
    for said, tensors in wrong.items():
        with pytest.raises(CheckpointError, match=said):
            optimizer.load_state_tensors(tensors)
    pairs = zip(before, _bits(parameters, optimizer), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_weight_without_a_gradient_is_left_and_counts_its_own_updates() -> None:
    parameters, optimizer = _made()
    before = parameters[1].detach().clone()
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step(1e-2)
    assert torch.equal(parameters[1], before)
    assert "1.step" not in optimizer.state_tensors()
    # Its first update is later, and is corrected as a first one: as large as the rate.
    parameters[1].grad = torch.ones_like(parameters[1])
    optimizer.step(1e-2)
    moved = (before.double() - parameters[1].detach().double()).mean()
    assert float(moved) == pytest.approx(1e-2, rel=0.1)
    assert int(optimizer.state_tensors()["0.step"]) == 1
    optimizer.forget()
    assert not optimizer.has_states()


def test_vectors_take_no_decay() -> None:
    parameters, optimizer = _made()
    optimizer.weight_decay = 0.5
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    assert torch.equal(parameters[1], before[1])
    ratio = parameters[0].detach().double().sum() / before[0].double().sum()
    assert float(ratio) == pytest.approx(1 - 0.1 * 0.5, rel=0.05)


def test_a_recipe_asks_for_it_with_bf16_weights_only() -> None:
    recipe = Recipe(
        model=ModelSection(id="-"),
        data=DataSection(train="-"),
        full=FullSection(weights="bf16", optimizer="adamw_bf16"),
    )
    model = nn.Linear(3, 3).bfloat16()
    assert isinstance(make_optimizer(model, recipe, Method.FULL, seed=0), Bf16AdamW)
    fields = {"model": {"id": "x"}, "data": {"train": "x"}, "full": {"optimizer": "adamw_bf16"}}
    with pytest.raises(RecipeError, match=r"set full\.weights: bf16 too"):
        parse(fields)
