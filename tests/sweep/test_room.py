"""How many are let in: what is planned first, and what a plan that does not fit says."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from tunefork.plan.gate import DoesNotFitError
from tunefork.plan.schema import Interval
from tunefork.plan.shape import PlanError
from tunefork.plan.together import Together
from tunefork.recipe import LoraSection, Recipe
from tunefork.sweep.group import Member
from tunefork.sweep.room import Room, plan_room

Make = Callable[..., Recipe]
Asked = list[list[LoraSection]]
_LORAS: tuple[dict[str, Any], ...] = (
    {"rank": 6, "targets": "attention"},
    {"rank": 4},
    {"rank": 2, "targets": "attention"},
)


@pytest.fixture
def members(make_recipe: Make) -> list[Member]:
    recipes = [make_recipe(lora=lora) for lora in _LORAS]
    data: Any = None
    return [Member(f"m{n}", r, Path(), data, (), (), 1) for n, r in enumerate(recipes)]


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Asked]:
    """Has room for so many adapters; what is asked of the plan is noted."""

    def patch(count: int) -> Asked:
        asked: Asked = []

        def fits(recipe: Recipe, loras: Sequence[LoraSection]) -> Together:
            asked.append(list(loras))
            kind: Literal["none"] = "none"
            gib = Interval(mid=2.0**30, low=2.0**30, high=len(loras) * 2.0**30)
            largest = min(len(loras), count)
            return Together(len(loras) <= count, largest, kind, gib, gib, count * 2**30, 0, 0, ())

        monkeypatch.setattr("tunefork.sweep.room.fits", fits)
        return asked

    return patch


def _room(members: Sequence[Member], cap: int | None = None, ignore_plan: bool = False) -> Room:
    return plan_room(members, cap=cap, say=lambda line: None, ignore_plan=ignore_plan)


def test_so_many_fit_whichever_they_are_and_more_are_planned_by_themselves(
    members: list[Member], room_for: Callable[[int], Asked]
) -> None:
    asked = room_for(2)
    room = _room(members)
    assert [lora.rank for lora in asked[0]] == [4, 6, 2]  # by parameters: the first fits twice
    assert room.of_any == 2 and room.has(members[:1], members[1]) and len(asked) == 1
    assert not room.has(members[:2], members[2]) and not room.has(members[:2], members[2])
    assert len(asked) == 2  # once for each company


def test_what_was_asked_for_and_does_not_fit_is_refused(
    members: list[Member], room_for: Callable[[int], Asked]
) -> None:
    room_for(2)
    with pytest.raises(DoesNotFitError, match=r"--together 3: .* up to 3.0 GiB, .* 2 fit"):
        _room(members, cap=3)
    assert _room(members, cap=3, ignore_plan=True).has(members[:2], members[2])
    assert not _room(members, cap=1).has(members[:1], members[1])
    room_for(0)
    with pytest.raises(DoesNotFitError, match=r"not even one adapter of lora.rank 4 fits"):
        _room(members)


def test_where_nothing_can_be_planned_all_are_let_in(
    members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fits(*_: object) -> Together:
        raise PlanError("cannot be traced")

    monkeypatch.setattr("tunefork.sweep.room.fits", fits)
    said = list[str]()
    room = plan_room(members, cap=None, say=said.append)
    assert room.has(members[:2], members[2]) and "cannot be traced" in said[0]
