"""What a fleet asks of the group that trains its members in one pass over one base."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.data.loader import Data
from tunefork.recipe import Checkpointing, Recipe
from tunefork.train.loop import StepRecord
from tunefork.train.state import State


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter to train: all that `tunefork train` would know of it."""

    name: str
    recipe: Recipe
    """Its own: `tunefork train` takes it as it is."""
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
    checkpointing: Checkpointing = "none"
    """What `train.activation_checkpointing: auto` comes to in its group."""

    @property
    def settled(self) -> Recipe:
        """The recipe with nothing left open: what checkpoints are of."""
        if self.recipe.train.activation_checkpointing != "auto":
            return self.recipe
        update = {"activation_checkpointing": self.checkpointing}
        return self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update=update)})

    @property
    def learning_rate(self) -> float:
        """Peak."""
        return self.recipe.learning_rate(self.recipe.method)


@dataclass(frozen=True, slots=True)
class Stepped:
    """A member took an optimiser step, or failed at it and is out of the group, or is odd."""

    name: str
    record: StepRecord | None
    error: Exception | None = None
    warning: str | None = None


class Group(Protocol):
    """Members that train together; they come and go between passes, the others untouched."""

    def add(self, member: Member, start: State | None) -> None:
        """Take a member in, from its first step or from `start` on."""

    def remove(self, name: str) -> None:
        """Let a member go; what it learnt is gone unless its state was taken."""

    def step(self) -> Sequence[Stepped]:
        """One optimiser step of each member; what is not known yet is told by the next call.

        A step on which something of its member's follows (a validation, a rung, its end) is told
        at once.
        """

    def sync(self) -> Sequence[Stepped]:
        """What is not told yet."""
        return ()

    def order(self) -> list[str]:
        """Names in the order that the bits of a pass follow from."""

    def state(self, name: str) -> State:
        """A member between two steps, in host memory, as if it had trained alone."""

    def only(self, name: str) -> AbstractContextManager[PreTrainedModel]:
        """The base with this member's deltas alone, in eval mode, for any ordinary pass."""
