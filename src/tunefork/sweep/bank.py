"""The group that a fleet trains: one base with a bank of deltas (`train/together.py`).

The base is loaded when the first member comes in: a fleet that is done loads nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from tunefork.errors import DivergedError, NoGradientError
from tunefork.evaluate.evaluate import pad_id
from tunefork.model.bank import BankAdapter
from tunefork.model.device import pick_device, pick_dtype, reset_peak
from tunefork.model.load import load_tokenizer
from tunefork.recipe import Recipe
from tunefork.sweep.group import Member, Stepped
from tunefork.train import deterministic, together
from tunefork.train.member import Member as GroupMember
from tunefork.train.member import MemberEvent, MemberFailed, MemberStep, MemberWarned, member_of
from tunefork.train.out_of_memory import Remedies, phase
from tunefork.train.state import State
from tunefork.train.together_build import group_of, load_for_group


def open_group(recipe: Recipe, members: Sequence[Member]) -> "BankGroup":
    """A group over the base of `recipe` for `members`, who need not all be in at one time."""
    return BankGroup(recipe, members, load_tokenizer(recipe.model))


@dataclass(slots=True)
class BankGroup:
    """`group.Group` over a bank."""

    recipe: Recipe
    """Of the base and of how passes run."""
    members: Sequence[Member]
    """All that may come in."""
    tokenizer: Any
    inner: together.Group | None = None
    _first: list[tuple[GroupMember, State | None]] = field(default_factory=list)
    _stops: dict[str, Callable[[int], bool]] = field(default_factory=dict)
    _launched: dict[str, int] = field(default_factory=dict)

    def add(self, member: Member, start: State | None) -> None:
        """Take a member in; those of before the first pass start the group together."""
        own = member_of(
            member.recipe,
            member.examples,
            name=member.name,
            learning_rate=member.learning_rate,
            seed=member.recipe.train.seed,
        )
        self._launched[member.name] = 0 if start is None else start.progress.step
        self._stops[member.name] = stops_of(member)
        if self.inner is None:
            self._first.append((own, start))
        else:
            self.inner.add(own, start)

    def remove(self, name: str) -> None:
        """Free a member's slot."""
        self._opened().remove(name)
        del self._launched[name], self._stops[name]

    def step(self) -> list[Stepped]:
        """One optimiser step of every member."""
        group = self._opened()
        with deterministic.deterministic(self.recipe.train.deterministic):
            events = group.step()
            is_stop = False
            for name in self._launched:
                self._launched[name] += 1
                is_stop |= self._stops[name](self._launched[name])
            if is_stop:  # its figures are wanted before anything else is launched
                events += group.drain()
        return self._told(events)

    def sync(self) -> list[Stepped]:
        """Wait for what was launched."""
        return [] if self.inner is None else self._told(self.inner.drain())

    def state(self, name: str) -> State:
        """A member as if it had trained alone."""
        return self._opened().state(name)

    def order(self) -> list[str]:
        """Names in the order of their slots, which the order of sums follows."""
        return self._opened().live

    @contextmanager
    def only(self, name: str) -> Iterator[PreTrainedModel]:
        """The base with one member's deltas."""
        group = self._opened()
        with group.only(name):
            yield group.model

    def _opened(self) -> together.Group:
        if self.inner is None:
            adapters = [BankAdapter(own.lora, own.seed) for own, _ in self._first]
            device, recipe = pick_device(), self.recipe
            with phase("load", Remedies.of(recipe, recipe.method)):
                bank = load_for_group(
                    recipe,
                    recipe.method,
                    adapters,
                    dtype=pick_dtype(recipe.train.precision, device),
                    device=device,
                    announced=[member.recipe.lora for member in self.members],
                    examples=self.members[0].examples,  # whoever is left: the same base each time
                )
            reset_peak(bank.device)
            self.inner = group_of(
                bank,
                [own for own, _ in self._first],
                recipe,
                pad_id=pad_id(self.tokenizer),
                starts={own.name: start for own, start in self._first if start is not None},
            )
            self._first = []
        return self.inner

    def _told(self, events: Sequence[MemberEvent]) -> list[Stepped]:
        found = []
        for event in events:
            match event:
                case MemberStep(name, record):
                    found.append(Stepped(name, record))
                case MemberWarned(name, _, message):
                    found.append(Stepped(name, None, warning=message))
                case MemberFailed(name, _, reason, is_lost):
                    self._launched.pop(name, None)
                    self._stops.pop(name, None)
                    error = NoGradientError(reason) if is_lost else DivergedError(reason)
                    found.append(Stepped(name, None, error))
        return found


def stops_of(member: Member) -> Callable[[int], bool]:
    """Whether something follows on a step of `member`: a validation, a rung, its end."""
    every = member.recipe.train.validate_every_steps if member.validation else None

    def is_stop(step: int) -> bool:
        is_end = step in member.rungs or step >= member.num_steps
        return is_end or (every is not None and step % every == 0)

    return is_stop
