"""When the states of all members are saved, and that they go with each other.

Each member's state is an ordinary checkpoint in its own folder. `moment.json` is written once those
of one moment are all on the disk, and says which steps these are: what was killed goes on from
there, and its passes are then the very ones that would have followed.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tunefork.recipe import Recipe
from tunefork.registry.run import write_atomically
from tunefork.sweep.group import Group
from tunefork.sweep.seat import Seat

FILE = "moment.json"

_ALWAYS_SAVED_BYTES = 2**28
"""States up to this size are saved whenever a member leaves, so that a kill costs no exactness."""


@dataclass(slots=True)
class Moments:
    """Of one fleet."""

    folder: Path
    every_s: float | None = None
    every_passes: int | None = None
    _passes: int = 0
    _written: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, folder: Path, recipe: Recipe) -> Self:
        """As often as the recipe's checkpoints; a step is a pass."""
        return cls(folder, recipe.train.checkpoint_every_s, recipe.train.checkpoint_every_steps)

    def is_due(self, seats: Iterable[Seat], *, has_left: bool) -> bool:
        """Whether the states are to be saved after a pass, in which a member left or none did."""
        self._passes += 1
        state_bytes = sum(seat.state_bytes for seat in seats)
        since = time.monotonic() - self._written
        return (
            (self.every_s is not None and since >= self.every_s)
            or (self.every_passes is not None and self._passes % self.every_passes == 0)
            or (has_left and state_bytes <= _ALWAYS_SAVED_BYTES)
        )

    def read(self) -> dict[str, int]:
        """Member -> the step of its state at the last moment, in the order of the passes."""
        file = self.folder / FILE
        found: dict[str, int] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        return found

    def save(self, seats: Mapping[str, Seat], group: Group) -> None:
        """The state of all that are in; nothing that they launched is left untold."""
        if not seats:
            return
        for seat in seats.values():
            seat.save(group)
        steps = {name: seats[name].progress.step for name in group.order() if name in seats}
        write_atomically(self.folder / FILE, json.dumps(steps))
        self._written = time.monotonic()

    def clear(self) -> None:
        """All members are at their end."""
        (self.folder / FILE).unlink(missing_ok=True)


def preemption_file(recipe: Recipe) -> Path | None:
    """The file whose appearance ends a fleet after the pass at hand."""
    file = recipe.train.preemption_file
    return None if file is None else Path(file).expanduser()
