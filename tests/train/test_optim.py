"""AdamW through shadows, stochastic rounding, clipping and schedules."""

import pytest
import torch
from torch import nn

from tunefork.train import optim
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.optim import (
    ShadowAdamW,
    learning_rate_at,
)

BETAS = (0.9, 0.999)


def _steps(parameters: list[nn.Parameter], optimizer: ShadowAdamW | LoraAdamW, n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step(1e-2)
        assert all(p.grad is None or not p.grad.any() for p in parameters)


def _parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((6, 5), (7,))]


def test_shadowed_fp32_equals_adamw() -> None:
    expected, actual = _parameters(torch.float32), _parameters(torch.float32)
    _steps(expected, LoraAdamW(expected, betas=BETAS, weight_decay=0.0), 5)
    shadowed = ShadowAdamW(
        actual, keep_shadows=False, eight_bit=False, betas=BETAS, weight_decay=0.0
    )
    _steps(actual, shadowed, 5)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("keep_shadows", [True, False])
def test_bf16_weights_do_not_lose_small_updates(keep_shadows: bool) -> None:
    """A hundred updates of 1e-4 on weights of 1.0, whose bf16 neighbours are 8e-3 and 4e-3 away."""
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = ShadowAdamW(
        [parameter], keep_shadows=keep_shadows, eight_bit=False, betas=BETAS, weight_decay=0.0
    )
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-4)
    moved = 1.0 - float(parameter.detach().float().mean())
    assert moved == pytest.approx(0.01, rel=0.25)


def test_rounding_hangs_on_seed_and_count_and_a_generator_of_before_is_passed_over() -> None:
    def made(seed: int) -> tuple[nn.Parameter, ShadowAdamW]:
        parameter = nn.Parameter(torch.ones(64, 65, dtype=torch.bfloat16))
        options = {"betas": BETAS, "weight_decay": 0.0}
        return parameter, ShadowAdamW(
            [parameter],
            keep_shadows=False,
            eight_bit=True,
            seed=seed,
            **options,  # type: ignore[arg-type]
        )

    def step(parameter: nn.Parameter, optimizer: ShadowAdamW) -> None:
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-4)

    whole = made(0)
    step(*whole)
    saved = {name: value.clone() for name, value in whole[1].state_tensors().items()}
    weight = whole[0].detach().clone()
    step(*whole)
    for seed in (0, 1):
        parameter, optimizer = made(seed)
        optimizer.load_state_tensors(saved | {"generator.cpu": torch.get_rng_state()})
        parameter.data.copy_(weight)
        step(parameter, optimizer)
        assert torch.equal(parameter, whole[0]) == (seed == 0)


@pytest.mark.parametrize("keep_shadows", [True, False])
def test_at_once_it_does_what_the_way_through_a_shadow_does(
    keep_shadows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its definition stands for a GPU's kernel. The third step goes on from a saved state."""

    def made() -> tuple[list[nn.Parameter], ShadowAdamW]:
        parameters = [*_parameters(torch.bfloat16), nn.Parameter(torch.ones(3, 2))]
        return parameters, ShadowAdamW(
            parameters, keep_shadows=keep_shadows, eight_bit=False, betas=BETAS, weight_decay=0.1
        )

    def step(parameters: list[nn.Parameter], optimizer: ShadowAdamW, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step(1e-2, 0.5)
        assert all(p.grad is None for p in parameters)

    usual = made()
    monkeypatch.setattr(optim, "_allows_at_once", lambda p: p.dtype == torch.bfloat16)
    before, after = made(), made()
    assert [len(before[1].room(index)) for index in range(3)] == [0, 0, 0]
    for seed in (1, 2):
        step(*usual, seed)
        step(*before, seed)
    after[1].load_state_tensors(before[1].state_tensors())
    for here, there in zip(after[0], before[0], strict=True):
        here.data.copy_(there)
    step(*usual, 3)
    step(*after, 3)
    for a, b in zip(usual[0], after[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    expected, found = usual[1].state_tensors(), after[1].state_tensors()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    after[1].forget()
    assert not after[1].has_states()


def test_eight_bit_moments_follow_adamw() -> None:
    torch.manual_seed(0)
    start = torch.randn(64, 128)
    exact, small = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    _steps([exact], LoraAdamW([exact], betas=BETAS, weight_decay=0.0), 10)
    optimizer = ShadowAdamW(
        [small], keep_shadows=True, eight_bit=True, betas=BETAS, weight_decay=0.0
    )
    _steps([small], optimizer, 10)
    moved, error = exact - start, small - exact
    assert 0 < float((error.norm() / moved.norm()).detach()) < 0.1
    state = optimizer.inner[0].state[optimizer.shadows[0]]
    assert state["state1"].dtype == torch.uint8


def test_weight_decay_spares_vectors() -> None:
    parameters = _parameters(torch.float32)
    before = [p.detach().clone() for p in parameters]
    optimizer = ShadowAdamW(
        parameters, keep_shadows=False, eight_bit=False, betas=BETAS, weight_decay=0.5
    )
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    torch.testing.assert_close(parameters[0].detach(), before[0] * (1 - 0.1 * 0.5))
    torch.testing.assert_close(parameters[1].detach(), before[1])


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1)])
def test_schedules(schedule: str, half: float) -> None:
    rates = [
        learning_rate_at(s, num_steps=110, peak=2.0, schedule=schedule, warmup_share=10 / 110)
        for s in range(110)
    ]
    assert rates[0] == pytest.approx(2.0 / 11)
    assert rates[10] == pytest.approx(2.0) and max(rates) == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * half)
    assert rates[-1] > 0
