"""What a fleet asks of the group that trains its members in one pass over one base."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.data.loader import Data
from tunefork.recipe import Recipe
from tunefork.train.loop import StepRecord
from tunefork.train.state import State


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter to train: all that `tunefork train` would know of it."""

    name: str
    recipe: Recipe
    """Its own, resolved: `tunefork train` takes it as it is."""
    folder: Path
    """Its run folder."""
    data: Data
    examples: Sequence[Encoded]
    """Trained on."""
    validation: Sequence[Encoded]
    """Held back; empty where the recipe validates nothing."""
    num_steps: int
    rungs: tuple[int, ...] = ()
    """Steps after which it waits for a decision."""

    @property
    def learning_rate(self) -> float:
        """Peak."""
        return self.recipe.learning_rate(self.recipe.method)


@dataclass(frozen=True, slots=True)
class Stepped:
    """A member took an optimiser step, or failed at it and is out of the group."""

    name: str
    record: StepRecord | None
    error: Exception | None = None


class Group(Protocol):
    """Members that train together; they come and go between passes, the others untouched."""

    def add(self, member: Member, start: State | None) -> None:
        """Take a member in, from its first step or from `start` on."""

    def remove(self, name: str) -> None:
        """Let a member go; what it learnt is gone unless its state was taken."""

    def step(self) -> Sequence[Stepped]:
        """One pass. Members whose last micro-batch of a step was in it took that step."""

    def state(self, name: str) -> State:
        """A member between two steps, in host memory, as if it had trained alone."""

    def only(self, name: str) -> AbstractContextManager[PreTrainedModel]:
        """The base with this member's deltas alone, in eval mode, for any ordinary pass."""
