"""How many members train at one time: as many as fit in memory, or as are asked for."""

from collections.abc import Callable, Sequence

from tunefork.recipe import Recipe
from tunefork.sweep.group import Member

_MOST = 64


def room_for(
    recipe: Recipe,
    members: Sequence[Member],
    *,
    cap: int | None,
    say: Callable[[str], None],
) -> Callable[[Sequence[Member], Member], bool]:
    """Whether a member fits beside those that are in."""

    def has_room(seated: Sequence[Member], member: Member) -> bool:
        return len(seated) < (cap or _MOST)

    return has_room
