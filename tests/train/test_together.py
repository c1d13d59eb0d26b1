"""A member of a group against the same adapter trained alone; what one can do to the others."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.train.groups import (
    SETTINGS,
    alone,
    base,
    distance,
    group_of,
    member,
    members,
    records,
    run,
    weights,
)
from tests.train.test_loss import examples
from tunefork.data.example import Encoded
from tunefork.errors import NoMemoryError
from tunefork.model.add_bank import add_bank
from tunefork.model.attention import NAME, register
from tunefork.model.bank import BankAdapter
from tunefork.model.build import build
from tunefork.model.head import find_head
from tunefork.recipe import Method
from tunefork.train.member import MemberDone, MemberFailed
from tunefork.train.runner import Laid, Runner
from tunefork.train.state import State, restore_weights
from tunefork.train.together import Group
from tunefork.train.together_cut import PassCut


@pytest.mark.parametrize("num_steps", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_each_of_eight_ends_as_it_does_alone(num_steps: int) -> None:
    """Issue 7: per tensor ||dW_group - dW_solo|| / ||dW_solo|| <= 1e-4 after 50 steps, losses to
    1e-5; ranks 1 to 64, other rates, schedules, decays, clipping, data, targets, lengths."""
    chosen = members(num_steps)
    group = group_of(chosen)
    events = run(group)
    untrained = group_of(chosen)
    for one in chosen:
        solo = alone(one)
        ours = records(events, one.name)
        assert [r.step for r in ours] == [r.step for r in solo.records]
        assert [r.tokens for r in ours] == [r.tokens for r in solo.records]
        for mine, its in zip(ours, solo.records, strict=True):
            assert mine.loss == pytest.approx(its.loss, rel=1e-5)
            assert mine.grad_norm == pytest.approx(its.grad_norm, rel=1e-4)
            assert mine.learning_rate == its.learning_rate
        end, start = weights(group.state(one.name)), weights(untrained.state(one.name))
        expected = weights(solo.state)
        assert list(end) == list(expected)
        for name, value in expected.items():
            moved = value - start[name]
            assert (end[name] - value).norm() <= 1e-4 * moved.norm(), (one.name, name)
    assert [e.name for e in events if isinstance(e, MemberDone)] != [one.name for one in chosen]
    assert {e.name for e in events if isinstance(e, MemberDone)} == {one.name for one in chosen}


class _Broken(Sequence[Encoded]):
    """Examples of which one cannot be read."""

    def __init__(self, inner: Sequence[Encoded], at: int) -> None:
        self.inner, self.at = inner, at

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, at: int) -> Encoded:  # type: ignore[override]
        if at == self.at:
            raise OSError("a secret row")
        return self.inner[at]


def _same_bits(left: State, right: State) -> bool:
    return left.progress.losses == right.progress.losses and all(
        torch.equal(value, right.tensors[name])
        for name, value in left.tensors.items()
        if not name.startswith("random/")
    )


def test_one_that_diverges_changes_no_bit_of_the_others() -> None:
    healthy = members(8, range(5))
    sick = list(healthy)
    rates = list(healthy[2].learning_rates)
    rates[2] = 1e38  # the update overflows; the step after it is not finite
    sick[2] = replace(healthy[2], learning_rates=rates)
    group, expected = group_of(sick), group_of(healthy)
    events = run(group)
    run(expected)
    [failed] = [e for e in events if isinstance(e, MemberFailed)]
    assert failed.name == "member-2" and "step 4: the loss is nan" in failed.reason
    assert "row " in failed.reason and "learning_rate" in failed.reason
    assert len(records(events, "member-2")) == 3
    assert group.state("member-2").progress.step == 3
    for one in healthy:
        if one.name != "member-2":
            assert _same_bits(group.state(one.name), expected.state(one.name)), one.name
            assert records(events, one.name)[-1].step == len(one.steps)


def test_one_that_a_step_leaves_no_gradient_stays_as_it_was_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = members(8, range(3))
    expected = group_of([replace(m, steps=m.steps[:2]) for m in chosen])
    run(expected)
    first, taken = PassCut.gradient, list[int]()

    def gradient(self: PassCut, chosen: Sequence[Sequence[Encoded]], counts: Tensor) -> Tensor:
        loss_g = first(self, chosen, counts)
        taken.append(len(taken) + 1)
        for parameter in self.runner.trained:
            assert parameter.grad is not None
            parameter.grad *= float(len(taken) < 3)
        return loss_g

    monkeypatch.setattr(PassCut, "gradient", gradient)
    group = group_of(chosen)
    failed = [e for e in run(group) if isinstance(e, MemberFailed)]
    assert [(e.step, e.is_lost) for e in failed] == [(3, True)] * 3
    assert "nothing is learnt" in failed[0].reason and "compile: never" in failed[0].reason
    for one in chosen:
        assert _same_bits(group.state(one.name), expected.state(one.name)), one.name


def test_one_whose_data_cannot_be_read_is_named_without_its_text() -> None:
    same_lengths = [
        replace(
            m,
            examples=[
                replace(e, input_ids=e.input_ids[:5], supervised=e.supervised[:5] | True)
                for e in m.examples
            ],
        )
        for m in members(6, range(3))
    ]
    broken = list(same_lengths)
    at = same_lengths[1].steps[2][0]
    broken[1] = replace(same_lengths[1], examples=_Broken(same_lengths[1].examples, at))
    group, expected = group_of(broken), group_of(same_lengths)
    events = run(group)
    run(expected)
    [failed] = [e for e in events if isinstance(e, MemberFailed)]
    assert failed.name == "member-1" and failed.step == 3
    assert "OSError" in failed.reason and "secret" not in failed.reason
    for name in ("member-0", "member-2"):
        assert _same_bits(group.state(name), expected.state(name))


def test_leaving_and_joining_leaves_the_others_as_they_would_be() -> None:
    """One is removed half way, another takes its slot, a third needs a new shape."""
    first = members(9, (2, 3, 6))
    small, large = member(1, 6), member(7, 5)
    group = group_of(first, announced=[small.lora, large.lora])
    events = run(group, 3)
    left = group.remove("member-3")
    events += run(group, 1)
    group.add(replace(small, lora=member(3, 9).lora))  # what fits a free slot reuses it
    assert group.slot_of("member-1") == 1 and group.bank.num_slots == 3
    rows = [layer.rows_a for layer in group.bank.layers.values()]
    events += run(group, 1)
    group.add(large)
    assert group.bank.num_slots == 4
    assert all(
        layer.rows_a is not old for layer, old in zip(group.bank.layers.values(), rows, strict=True)
    )
    events += run(group)
    assert not group.live
    assert left.progress.step == 3
    assert distance(left, alone(member(3, 9), stop_after=3).state) < 1e-4
    for one in (first[0], first[2], replace(small, lora=member(3, 9).lora), large):
        solo = alone(one)
        assert distance(group.state(one.name), solo.state) < 1e-4, one.name
        losses = [r.loss for r in records(events, one.name)]
        assert losses == pytest.approx([r.loss for r in solo.records], rel=1e-4)


def test_a_failed_slot_is_taken_by_the_next() -> None:
    sick, healthy, late = member(2, 6), member(0, 6), member(2, 6)
    group = group_of([replace(sick, learning_rates=[1e38] * 6), healthy])
    run(group, 2)
    assert group.live == ["member-0"]
    group.add(replace(late, name="late"))
    assert group.slot_of("late") == 0
    run(group)
    assert distance(group.state("late"), alone(late).state) < 1e-4
    assert distance(group.state("member-0"), alone(healthy).state) < 1e-4


@pytest.mark.parametrize("packing", [True, False])
def test_how_a_step_is_cut_changes_no_gradient(packing: bool) -> None:
    chosen = members(4, (0, 3, 5))
    whole = group_of(chosen)
    cut = group_of(chosen, replace(SETTINGS, micro_batch_tokens=40, packing=packing))
    run(whole)
    run(cut)
    for one in chosen:
        assert distance(cut.state(one.name), whole.state(one.name)) < 1e-4


def test_a_member_acts_alone_on_the_shared_base() -> None:
    group = group_of(members(3, (0, 3)))
    run(group)
    ids = torch.arange(3, 19)[None]
    with group.only("member-3"):
        assert not group.model.training
        found = group.model(input_ids=ids).logits
    assert group.model.training
    model = base().eval()
    build(model, Method.LORA, member(3, 3).lora, seed=0)
    restore_weights(group.state("member-3"), model)
    torch.testing.assert_close(found, model(input_ids=ids).logits)


@pytest.mark.parametrize("lengths", [(9, 4, 17, 6, 12, 8), (128,) * 6])
def test_passes_without_a_mask_and_filled_up_are_the_same(lengths: tuple[int, ...]) -> None:
    """What a GPU runs: tokens in segments of one row (or whole rows), filled up to few sizes."""
    chosen = [
        replace(one, examples=examples(lengths, seed=at), steps=[[0, 1], [2, 3, 4], [5, 0]])
        for at, one in enumerate(members(3, (0, 3, 5)))
    ]
    found = []
    for in_segments in (False, True):
        torch.manual_seed(0)
        bank = add_bank(_in_segments(), [BankAdapter(m.lora, m.seed) for m in chosen])
        head = replace(find_head(bank.model), takes_segments=in_segments)
        runner = Runner(bank.model, head, pads=in_segments, bank=bank)
        group = Group(bank, chosen, replace(SETTINGS, micro_batch_tokens=1100), runner=runner)
        events = run(group)
        found.append((group, events))
    for one in chosen:
        first, second = (records(events, one.name) for _, events in found)
        assert len(first) == 3
        assert [r.loss for r in second] == pytest.approx([r.loss for r in first], rel=1e-5)
        # AdamW's first steps are sign-like: a gradient near zero may flip by rounding.
        assert distance(*(group.state(one.name) for group, _ in found)) < 2e-3


def _in_segments() -> PreTrainedModel:
    """`base` with the attention that takes segments."""
    register()
    model = base()
    model.set_attn_implementation(NAME)
    return model


class _Cramped(Runner):
    """Has room for passes of 50 tokens, and spoils the gradients of larger ones."""

    def loss(self, laid: Laid, supervised: int | torch.Tensor, where: str) -> torch.Tensor:
        if laid.batch.input_ids.numel() > 50:
            for parameter in self.trained:
                assert parameter.grad is not None
                parameter.grad.fill_(7.0)
            raise NoMemoryError(where)
        return super().loss(laid, supervised, where)


def test_a_step_without_memory_is_taken_again_in_smaller_passes() -> None:
    chosen = members(3, (0, 3))
    expected = group_of(chosen)
    run(expected)
    for wish in ("shrink", "error"):
        bank = add_bank(base(), [BankAdapter(m.lora, m.seed) for m in chosen])
        runner = _Cramped(bank.model, find_head(bank.model), bank=bank)
        settings = replace(SETTINGS, on_out_of_memory=wish)
        group = Group(bank, chosen, settings, runner=runner)
        if wish == "error":
            with pytest.raises(NoMemoryError, match="group's pass"):
                run(group)
            return
        run(group)
        assert group.cut.limit <= 50 < SETTINGS.micro_batch_tokens
        for one in chosen:
            assert distance(group.state(one.name), expected.state(one.name)) < 1e-4


def test_figures_that_are_read_late_tell_the_same() -> None:
    """As on a GPU: a step is under way when the one before it is told to have failed."""
    healthy = members(8, range(3))
    rates = [*healthy[0].learning_rates[:2], 1e38, *healthy[0].learning_rates[3:]]
    broken = _Broken(healthy[1].examples, healthy[1].steps[5][0])
    sick = [
        replace(healthy[0], learning_rates=rates),
        replace(healthy[1], examples=broken),
        healthy[2],
    ]
    groups = [group_of(sick), group_of(sick)]
    groups[1].reads_late = True
    told = [run(group) for group in groups]
    assert groups[1].reads_late and not groups[1]._pending
    early, late = groups
    first, second = ({e.name: e for e in events if isinstance(e, MemberFailed)} for events in told)
    assert first == second and first["member-0"].step == 4
    assert first["member-1"].step <= 6
    for one in healthy:
        assert records(told[0], one.name) == records(told[1], one.name)
        assert _same_bits(early.state(one.name), late.state(one.name)), one.name
        assert early.state(one.name).progress.step == late.state(one.name).progress.step
