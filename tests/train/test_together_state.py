"""A group goes on from its checkpoints bit for bit, and one member of it goes on alone."""

from pathlib import Path

import pytest
import torch

from tests.train.groups import SETTINGS, alone, base, distance, group_of, member, members, run
from tunefork.errors import CheckpointError
from tunefork.model.build import build
from tunefork.recipe import LoraSection, Method
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.checkpoints import Checkpoints
from tunefork.train.loop import train
from tunefork.train.member import Member
from tunefork.train.state import State, first_difference


def _stores(chosen: list[Member], folder: Path) -> dict[str, Checkpoints]:
    return {m.name: Checkpoints(folder / m.name, {"of": m.name}, {}) for m in chosen}


def _difference(left: State, right: State) -> object:
    return first_difference(left.tensors, right.tensors)


def test_a_group_goes_on_bit_for_bit(tmp_path: Path) -> None:
    chosen = members(12, (0, 2, 3, 6))  # of which some end at 10, some at 12 steps
    whole, first = group_of(chosen), group_of(chosen)
    run(whole)
    run(first, 5)
    stores = _stores(chosen, tmp_path)
    first.checkpoint(stores)
    starts = {}
    for name, store in stores.items():
        found = store.newest()
        assert found is not None and found.facts.step == 5
        starts[name] = found.read()
    again = group_of(chosen, starts=starts)
    assert again.state("member-0").progress.step == 5
    run(again)
    for one in chosen:
        assert _difference(again.state(one.name), whole.state(one.name)) is None
        assert again.state(one.name).progress.losses == whole.state(one.name).progress.losses


def test_one_member_goes_on_alone_by_the_ordinary_loop(tmp_path: Path) -> None:
    chosen = members(10, (1, 4, 5))
    group = group_of(chosen)
    run(group, 4)
    stores = _stores(chosen, tmp_path)
    group.checkpoint(stores)
    run(group)
    one = member(4, 10)
    model = base()
    build(model, Method.LORA, one.lora, seed=99)
    optimizer = LoraAdamW(
        [p for p in model.parameters() if p.requires_grad],
        betas=one.betas,
        weight_decay=one.weight_decay,
    )
    start = stores[one.name].newest()
    assert start is not None
    steps = []
    train(
        model,
        one.examples,
        one.steps,
        optimizer,
        learning_rates=one.learning_rates,
        micro_batch_tokens=SETTINGS.micro_batch_tokens,
        packing=True,
        pad_id=0,
        max_grad_norm=one.max_grad_norm,
        seed=one.seed,
        on_step=lambda record: steps.append(record.step),
        checkpoints=stores[one.name],
        start=start,
    )
    assert steps == list(range(5, len(one.steps) + 1))
    trained = {f"weights/{n}": p for n, p in model.named_parameters() if p.requires_grad}
    for name, value in trained.items():
        expected = group.state(one.name).tensors[name]
        assert (value - expected).norm() < 1e-4 * expected.norm()


def test_a_run_alone_joins_a_group_where_it_stopped() -> None:
    one, other = member(3, 9), member(5, 9)
    half = alone(one, stop_after=4)
    group = group_of([other], announced=[one.lora])
    run(group, 2)
    group.add(one, half.state)
    run(group)
    assert distance(group.state(one.name), alone(one).state) < 1e-4
    assert distance(group.state(other.name), alone(other).state) < 1e-4


def test_another_adapters_state_is_refused_before_anything_changes() -> None:
    group = group_of(members(4, (0, 3)))
    run(group, 1)
    state = group.remove("member-0")
    before = group.state("member-3")
    with pytest.raises(CheckpointError, match="late: weights"):
        group.add(Member("late", LoraSection(rank=1, targets="mlp"), 0, [], [], []), state)
    assert _difference(before, group.state("member-3")) is None
    assert all(bool(t.isfinite().all()) for t in state.tensors.values() if t.dtype == torch.float32)
