"""A member of a group against the same adapter trained alone; what one can do to the others."""

import pytest

from tests.train.groups import (
    alone,
    group_of,
    members,
    records,
    run,
    weights,
)
from tunefork.train.member import MemberDone


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
