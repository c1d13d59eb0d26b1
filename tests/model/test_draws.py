"""A step over NF4 in FP8 draws its roundings by its number and its group's, and by nothing else."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model.test_fused_nf4 import fused
from tests.train.groups import base, member, run
from tunefork.data.example import Encoded
from tunefork.model.add_bank import add_bank
from tunefork.model.bank import BankAdapter
from tunefork.model.build import quantize_nf4
from tunefork.model.draws import draw_for
from tunefork.model.fused import FusedGroup, fuse
from tunefork.model.head import find_head
from tunefork.recipe import LoraSection
from tunefork.train.accumulate import Accumulator
from tunefork.train.member import MemberFailed
from tunefork.train.runner import Runner
from tunefork.train.together import Group, GroupSettings


def _seeds(groups: list[FusedGroup]) -> list[int]:
    return [int(group.weights[5 * len(group.layout.sizes) + 1][0]) for group in groups]


def test_each_group_and_each_step_has_its_own() -> None:
    model, groups = fused("fp8")
    found = []
    for step in (1, 2, 3):
        draw_for(model, step)
        found += _seeds(groups)
    assert len(set(found)) == len(found) == 3 * len(groups)
    draw_for(model, 2)
    assert _seeds(groups) == found[len(groups) : 2 * len(groups)]


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
def test_how_a_step_is_cut_changes_no_rounding(step: int) -> None:
    """Sums alone are taken in another order; another step's roundings are further off."""
    model, _ = fused("fp8", calibrates=True)
    whole, cut = _gradient(model, step, limit=128), _gradient(model, step, limit=16)
    other = _gradient(model, step + 1, limit=128)
    assert torch.equal(_gradient(model, step, limit=128), whole)
    assert (cut - whole).norm() < 0.01 * whole.norm()
    assert (other - whole).norm() > 0.02 * whole.norm()


def test_a_member_that_diverges_changes_no_bit_of_the_others() -> None:
    """The base's roundings are shared; what they are drawn by is not."""
    groups = []
    for worst_rate in (1e-3, 1e38):
        model = base().bfloat16()
        quantize_nf4(model)
        bank = add_bank(model, [BankAdapter(LoraSection(rank=4), seed) for seed in range(3)])
        fuse(model, "nf4", "fp8", torch.device("cpu"))
        members = [replace(member(at, 4), lora=LoraSection(rank=4)) for at in range(3)]
        rates = [1e-3, worst_rate, 1e-3, 1e-3]
        members[1] = replace(members[1], learning_rates=rates)
        groups.append(Group(bank, members, GroupSettings(4096)))
    told = [run(group) for group in groups]
    assert not any(isinstance(event, MemberFailed) for event in told[0])
    [failed] = [event for event in told[1] if isinstance(event, MemberFailed)]
    assert failed.step == 3
    for at in (0, 2):
        one, other = (group.state(members[at].name) for group in groups)
        for key, value in one.tensors.items():
            assert key.startswith("random/") or torch.equal(value, other.tensors[key]), key
