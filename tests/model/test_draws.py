"""A step in FP8 draws its roundings by its number and its group's, and by nothing else."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model.test_fused_nf4 import fused
from tests.train.groups import base, member, run
from tunefork.data.example import Encoded
from tunefork.kernels.fp8_weight import num_kept, rows_of
from tunefork.kernels.layout import Storage
from tunefork.model.add_bank import add_bank
from tunefork.model.bank import BankAdapter
from tunefork.model.build import quantize_nf4
from tunefork.model.draws import draw_for
from tunefork.model.fused import FusedGroup, calibrate, fuse
from tunefork.model.head import find_head
from tunefork.recipe import LoraSection
from tunefork.train.accumulate import Accumulator
from tunefork.train.member import Member, MemberFailed
from tunefork.train.runner import Runner
from tunefork.train.state import State
from tunefork.train.together import Group, GroupSettings


def _seeds(groups: list[FusedGroup]) -> list[tuple[int, int]]:
    """Seed and turn."""
    found = [group.weights[num_kept(group.layout) + 1].tolist() for group in groups]
    return [(seed, turn) for seed, _, turn, _ in found]


@pytest.mark.parametrize("storage", ["e4m5", "nf4"])
def test_each_group_and_each_step_has_its_own(storage: Storage) -> None:
    model, groups = fused("fp8", storage=storage)
    found = []
    for step in range(1, 9):
        draw_for(model, step)
        found += _seeds(groups)
    assert len(set(found)) == len(found) == 8 * len(groups)
    assert len({seed for seed, _ in found}) == (2 if storage == "e4m5" else 8) * len(groups)
    draw_for(model, 2)
    assert _seeds(groups) == found[len(groups) : 2 * len(groups)]


def test_of_four_steps_the_errors_of_a_weight_take_each_other_back() -> None:
    """What four steps with other seeds would leave is half of one's error; these leave nothing."""
    model, groups = fused("fp8", storage="e4m5")
    group = groups[0]
    exact = torch.cat([group.materialize(at) for at in range(len(group.layout.sizes))]).float()

    def errors(steps: range) -> list[Tensor]:
        found = []
        for step in steps:
            draw_for(model, step)
            rows = rows_of(group.layout, group.weights, group.features_in)
            codes = (rows.codes_turned().float().t(), rows.codes().float())
            found.append(torch.cat([each * rows.scale_1o.t() - exact for each in codes]))
        return found

    together, apart = errors(range(1, 5)), errors(range(1, 17, 4))
    single = together[0].norm()
    # `materialize` rounds to bf16.
    assert torch.stack(together).mean(0).norm() < 0.05 * single
    assert torch.stack(together[:2]).mean(0).norm() < 0.6 * single
    assert 0.4 < torch.stack(apart).mean(0).norm() / single < 0.6


def test_ten_bits_forget_the_weights_once_directions_are_set_or_setting_them_failed() -> None:
    for calibrates in (False, True):
        model, groups = fused("fp8", storage="e4m5", calibrates=calibrates)
        assert not any(group.exact for group in groups)
    for group in groups:
        group.exact = (torch.ones(1),)
    with pytest.raises(IndexError):
        calibrate(model.train(), groups, torch.full((1, 4), 10**6))
    assert model.training
    assert all(group.is_calibrated and not group.exact for group in groups)


def test_nothing_is_drawn_where_nothing_is_rounded_at_random() -> None:
    model, groups = fused("bf16")
    draw_for(model, 1)
    assert all(group.seeds_g4 is None for group in groups)


def _gradient(model: Any, step: int, limit: int) -> Tensor:
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 90, 16).astype(np.int32) for _ in range(8)]
    examples = [Encoded("-", ids, np.ones(16, np.bool_)) for ids in rows]
    model.train().zero_grad(set_to_none=True)
    cut = Accumulator(Runner(model, find_head(model)), limit, packing=False, pad_id=0)
    cut.gradient(examples, step)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("storage", ["e4m5", "nf4"])
def test_how_a_step_is_cut_changes_no_rounding(step: int, storage: Storage) -> None:
    """Sums alone are taken in another order; another step's roundings are further off."""
    model, _ = fused("fp8", calibrates=True, storage=storage)
    whole, cut = _gradient(model, step, limit=128), _gradient(model, step, limit=16)
    other = _gradient(model, step + 1, limit=128)
    assert torch.equal(_gradient(model, step, limit=128), whole)
    assert (cut - whole).norm() < 0.01 * whole.norm()
    assert (other - whole).norm() > 0.02 * whole.norm()


@pytest.mark.parametrize("storage", ["e4m5", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_member_that_diverges_changes_no_bit_of_the_others(storage: Storage) -> None:
    """The base's roundings are shared; what they are drawn by is not."""
    groups = [_group(storage, 3, {1: rate}) for rate in (1e-3, 1e38)]
    told = [run(group) for group in groups]
    assert not any(isinstance(event, MemberFailed) for event in told[0])
    [failed] = [event for event in told[1] if isinstance(event, MemberFailed)]
    assert failed.step == 3
    for name in ("m0", "m2"):
        _assert_same(*(group.state(name) for group in groups))


@pytest.mark.parametrize("storage", ["e4m5", pytest.param("nf4", marks=pytest.mark.slow)])
def test_one_that_joined_later_draws_on_as_before_when_the_first_fails(storage: Storage) -> None:
    states = []
    for rate in (1e-3, 1e38):
        group = _group(storage, 1, {0: rate}, announced=2, steps=8)
        told = run(group, 1)
        group.add(_member(1, 8, {}))
        told += run(group)
        assert sum(isinstance(event, MemberFailed) for event in told) == (rate > 1)
        states.append(group.state("m1"))
    _assert_same(*states)


def _member(at: int, steps: int, rates: dict[int, float]) -> Member:
    """Its second learning rate may be another."""
    found = replace(member(at, steps), lora=LoraSection(rank=4), name=f"m{at}")
    each = [1e-3] * steps
    each[1] = rates.get(at, 1e-3)
    return replace(found, learning_rates=each)


def _group(
    storage: Storage,
    count: int,
    rates: dict[int, float],
    announced: int | None = None,
    steps: int = 4,
) -> Group:
    model = base().bfloat16()
    if storage == "nf4":
        quantize_nf4(model)
    lora = LoraSection(rank=4)
    bank = add_bank(
        model,
        [BankAdapter(lora, seed) for seed in range(count)],
        announced=[lora] * (announced or count),
    )
    fuse(model, storage, "fp8", torch.device("cpu"))
    members = [_member(at, steps, rates) for at in range(count)]
    return Group(bank, members, GroupSettings(4096))


def _assert_same(one: State, other: State) -> None:
    for key, value in one.tensors.items():
        assert key.startswith("random/") or torch.equal(value, other.tensors[key]), key
