"""What the tiers know of one adapter, and what they ask of its slots."""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from tunefork.serve.engine import ServedAdapter
from tunefork.serve.engines.adapter_file import HostAdapter


class Slots(Protocol):
    """Where adapters are computed with."""

    num_slots: int

    def load(self, slot: int, adapter: HostAdapter) -> None:
        """Put an adapter into a slot that nobody computes with; returns when it is there."""

    def clear(self, slot: int) -> None:
        """Forget what is in `slot`."""


class Stage(Enum):
    """Where an adapter is."""

    READING = "reading"
    HOST = "host"
    MOVING = "moving"
    IN_SLOT = "in slot"


@dataclass(eq=False, slots=True)
class Entry:
    """An adapter that is on its way or there."""

    adapter: ServedAdapter
    stage: Stage
    host: HostAdapter | None = None
    slot: int | None = None
    granted: float = 0.0
    """Since when it is in its slot."""
    users: int = 0
    """Running requests."""
    is_tried: bool = False
    """In the next pass, or in one that is under way (`trial.py`)."""
    is_checked: bool = False
    """It was seen to change the logits."""
    is_awaited: bool = False
    """A request is about to come: worth a free slot, but nobody else's."""
    is_draining: bool = False
    is_forgotten: bool = False
    """It goes once nobody uses it. Whoever asks until then shares it: an id is one content."""
