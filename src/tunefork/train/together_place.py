"""A member in its slot: how far it is, and its part of a step that is under way."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from tunefork.data.example import Encoded
from tunefork.errors import TuneforkError
from tunefork.train.adamw_bank import SlotUpdate
from tunefork.train.guard import LOST_GRADIENT_ADVICE, SpikeWatch, lost_gradient
from tunefork.train.loop import StepRecord
from tunefork.train.member import Member, MemberEvent, MemberStep, MemberWarned
from tunefork.train.state import Progress

_MOST_NAMED = 16


@dataclass(slots=True)
class Place:
    """A member in its slot."""

    member: Member
    progress: Progress
    """Of the steps whose figures were read."""
    updates: int
    """AdamW's, of those steps."""
    launched: int
    """Number of the last step that was begun."""
    watch: SpikeWatch
    clock: float
    is_padding: bool = False
    """It failed: the slot is empty, and its tokens keep the others' where they are."""
    last: Sequence[Encoded] = ()
    """The examples of the last step that could be read."""

    @property
    def is_live(self) -> bool:
        """Whether a step is left to begin."""
        return not self.is_padding and self.launched < len(self.member.steps)

    def go_on(self) -> bool:
        """Make the next step the one that is begun; False where there is none."""
        if self.launched >= len(self.member.steps):
            self.last = ()
            return False
        self.launched += 1
        while self.launched in self.progress.skipped:
            self.launched += 1
        return True

    def read(self, slot: int, max_tokens: int) -> "Begun":
        """The step's examples. Raises TuneforkError where they are no step of a group whose passes
        hold `max_tokens`, and whatever reading them raises."""
        number, member = self.launched, self.member
        chosen = [member.examples[at] for at in member.steps[number - 1]]
        longest = max(len(example.input_ids) for example in chosen)
        if longest > max_tokens:
            raise TuneforkError(
                f"an example of {longest} tokens is longer than a pass of the group ({max_tokens}, "
                "train.micro_batch_tokens)"
            )
        supervised = sum(int(example.supervised[1:].sum()) for example in chosen)
        if supervised == 0:
            raise TuneforkError(f"no token is supervised in {names(chosen)}")
        self.last = chosen
        rate = member.learning_rates[number - 1]
        return Begun(slot, member.name, number, chosen, supervised, rate)

    def update(self, part: "Begun", under_way: int) -> SlotUpdate:
        """What AdamW does at the step that was begun, with so many before it still under way."""
        member = self.member
        return SlotUpdate(
            self.updates + under_way + 1,
            part.learning_rate,
            member.betas,
            member.weight_decay,
            member.max_grad_norm,
        )

    def record(self, part: "Begun", loss: float, norm: float) -> list[MemberEvent]:
        """Take in a step's figures; returns what there is to tell."""
        events: list[MemberEvent] = []
        if (spike := self.watch.found(loss)) is not None:
            message = f"step {part.step}: {spike} (rows {names(part.chosen)})"
            events.append(MemberWarned(part.name, part.step, message))
        now, done = time.perf_counter(), self.progress
        self.progress = replace(
            done,
            step=part.step,
            tokens=done.tokens + sum(len(example.input_ids) for example in part.chosen),
            supervised_tokens=done.supervised_tokens + part.supervised,
            seconds=done.seconds + now - self.clock,
            losses=tuple(self.watch.losses),
        )
        self.clock = now
        self.updates += 1
        rate, tokens = part.learning_rate, self.progress.tokens
        events.append(MemberStep(part.name, StepRecord(part.step, tokens, loss, rate, norm)))
        return events


@dataclass(frozen=True, slots=True)
class Begun:
    """One member's part of a step that is under way."""

    slot: int
    name: str
    step: int
    chosen: Sequence[Encoded]
    supervised: int
    learning_rate: float

    def sick(self, loss: float, norm: float) -> str | None:
        """In words, where one of its figures is not finite, or no gradient is left of its loss."""
        if (lost := lost_gradient(loss, norm)) is not None:
            return f"step {self.step}: {lost}. {LOST_GRADIENT_ADVICE}"
        if math.isfinite(loss) and math.isfinite(norm):
            return None
        return (
            f"step {self.step}: the loss is {loss} and the gradient's norm {norm}; the weights "
            f"were left as they were before the step. The step's rows: {names(self.chosen)}. "
            "Lower train.learning_rate, mend or remove those rows, or set train.precision: fp32"
        )


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that was launched, and its figures as they come back."""

    begun: list[Begun]
    figures: Tensor
    """(2, G): losses and norms."""
    arrived: Any
    """A CUDA event; None where they are there."""

    @classmethod
    def of(cls, begun: list[Begun], figures: Tensor) -> Self:
        """Figures on a GPU are copied without waiting for it."""
        if not figures.is_cuda:
            return cls(begun, figures, None)
        on_host = torch.empty(figures.shape, pin_memory=True).copy_(figures, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return cls(begun, on_host, arrived)

    def read(self) -> list[tuple[Begun, float, float]]:
        """Each part with its loss and norm, once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        losses, norms = self.figures.tolist()
        return [(part, losses[part.slot], norms[part.slot]) for part in self.begun]


def names(examples: Sequence[Encoded]) -> str:
    """Where they come from, in words."""
    named = ", ".join(example.source for example in examples[:_MOST_NAMED])
    more = len(examples) - _MOST_NAMED
    return f"{named} and {more} more" if more > 0 else named
