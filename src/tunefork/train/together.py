"""Many adapters trained over one base in the same passes, each as if it were alone.

    group = Group(bank, members, settings, runner=...)
    while group.is_at_work:
        for event in group.step():      # MemberStep, MemberWarned, MemberFailed, MemberDone
            ...
        group.add(...), group.remove(...)

A group step is one optimiser step of every live member: their examples share passes of at most
`micro_batch_tokens` tokens (`together_layout.py`), each member's summed loss is divided by its own
supervised tokens, and each has its own clipping, moments, learning rate and step count
(`adamw_bank.py`). So a member's weights are those of its run alone but for the order of sums.

Nothing of a member reaches another. One that fails (a loss or gradient that is not finite, an
example that cannot be read) is set aside with its reason; its slot is emptied and its tokens go on
as padding, so that no other member's bits change. `remove` frees a slot, `add` fills a free one
that is large enough, or else reshapes the group: then sums are cut up otherwise, and others agree
to float tolerance.

On a GPU the host does not wait: a step's figures are read when the next one is under way, and what
is sick has been held back on the device meanwhile. `drain` waits.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tunefork.data.example import Encoded
from tunefork.errors import CheckpointError, NoMemoryError, TuneforkError
from tunefork.model.bank import Bank, BankAdapter
from tunefork.model.head import find_head
from tunefork.train.accumulate import random_states, restore_random
from tunefork.train.adamw_bank import BankAdamW, SlotUpdate
from tunefork.train.checkpoints import Checkpoints
from tunefork.train.guard import SpikeWatch
from tunefork.train.kernels import attention_kernels
from tunefork.train.loop import StepRecord
from tunefork.train.member import (
    Member,
    MemberDone,
    MemberEvent,
    MemberFailed,
    MemberStep,
    MemberWarned,
)
from tunefork.train.runner import Runner
from tunefork.train.state import RANDOM, Progress, State
from tunefork.train.together_layout import passes, unsupervised
from tunefork.train.together_state import put_in, take_out

_MOST_NAMED = 16


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """What the members of a group share."""

    micro_batch_tokens: int
    """Most tokens of a pass over all members, padding included."""
    packing: bool = True
    pad_id: int = 0
    on_out_of_memory: Literal["error", "shrink"] = "error"


@dataclass(slots=True)
class _Place:
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


@dataclass(frozen=True, slots=True)
class _Begun:
    """One member's part of a step that is under way."""

    slot: int
    name: str
    step: int
    chosen: Sequence[Encoded]
    supervised: int
    learning_rate: float


@dataclass(slots=True)
class _Pending:
    """A step that was launched, and its figures as they come back."""

    begun: list[_Begun]
    figures: Tensor
    """(2, G): losses and norms."""
    arrived: Any
    """A CUDA event; None where they are there."""


class Group:
    """Members of one bank, trained together."""

    def __init__(
        self,
        bank: Bank,
        members: Sequence[Member],
        settings: GroupSettings,
        *,
        runner: Runner | None = None,
        starts: Mapping[str, State] | None = None,
    ) -> None:
        """`bank` has a slot for each of `members`, in order, as `add_bank` makes them.

        `starts` are the states from which some of them go on. Raises CheckpointError for one of
        another adapter.
        """
        names = [member.name for member in members]
        if len(set(names)) < len(names):
            raise ValueError(f"two members of a group are called {max(names, key=names.count)}")
        self.bank, self.settings = bank, settings
        self.model = bank.model
        self.model.train()
        torch.manual_seed(members[0].seed)
        self.runner = runner or Runner(self.model, find_head(self.model), bank=bank)
        self.optimizer = BankAdamW(bank)
        self.limit = settings.micro_batch_tokens
        self.places: dict[int, _Place] = {}
        self.failed: dict[str, MemberFailed] = {}
        self.done: dict[str, MemberDone] = {}
        self._states: dict[str, State] = {}
        self._pending: list[_Pending] = []
        self._events: list[MemberEvent] = []
        for slot, member in enumerate(members):
            self._enter(slot, member, (starts or {}).get(member.name))
        for state in (starts or {}).values():  # one common moment: the same generators
            self._restore_random(state)

    # What is going on

    @property
    def live(self) -> list[str]:
        """Members with steps left."""
        return [p.member.name for p in self.places.values() if self._is_live(p)]

    @property
    def is_at_work(self) -> bool:
        """Whether a step is left to take or to hear of."""
        return bool(self.live or self._pending or self._events)

    def slot_of(self, name: str) -> int:
        """Where a member that was not removed and did not fail is; KeyError for another."""
        for slot, place in self.places.items():
            if place.member.name == name and not place.is_padding:
                return slot
        raise KeyError(name)

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Within, the model is its base with this member's adapter, in eval mode."""
        with self.bank.only(self.slot_of(name)):
            self.model.eval()
            try:
                yield
            finally:
                self.model.train()

    # Steps

    def step(self) -> list[MemberEvent]:
        """One optimiser step of every live member; what is known since the last call.

        Raises NoMemoryError where the smallest passes do not fit, or may not be tried.
        """
        before = list(self._pending)
        with attention_kernels():
            self._launch()
        is_late = self.bank.device.type == "cuda" and bool(self.live)
        for pending in before if is_late else list(self._pending):
            self._collect(pending)
        return self._take_events()

    def drain(self) -> list[MemberEvent]:
        """Wait for what was launched, and tell of it."""
        for pending in list(self._pending):
            self._collect(pending)
        return self._take_events()

    def _take_events(self) -> list[MemberEvent]:
        events, self._events = self._events, []
        return events

    def _is_live(self, place: _Place) -> bool:
        return not place.is_padding and place.launched < len(place.member.steps)

    def _launch(self) -> None:
        chosen: list[Sequence[Encoded]] = [()] * self.bank.num_slots
        begun = []
        for slot, place in sorted(self.places.items()):
            part = self._next(slot, place)
            if part is not None:
                chosen[slot] = part.chosen
                begun.append(part)
            elif place.is_padding:
                chosen[slot] = unsupervised(place.last, self.settings.pad_id)
        if not begun:
            return
        counts_g = torch.ones(self.bank.num_slots)
        for part in begun:
            counts_g[part.slot] = part.supervised
        if self.bank.device.type == "cuda":
            counts_g = counts_g.pin_memory()
        loss_g = self._gradient(chosen, counts_g)
        updates = {part.slot: self._update(part) for part in begun}
        norm_g = self.optimizer.step(updates, loss_g)
        figures, arrived = torch.stack([loss_g, norm_g]), None
        if figures.is_cuda:
            on_host = torch.empty(figures.shape, pin_memory=True)
            figures = on_host.copy_(figures, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._pending.append(_Pending(begun, figures, arrived))

    def _next(self, slot: int, place: _Place) -> _Begun | None:
        """The next step of what is in `slot`; a failed member's moves its padding on."""
        member = place.member
        if place.launched >= len(member.steps):
            place.last = ()
            return None
        while (number := place.launched + 1) in place.progress.skipped:
            place.launched = number
        place.launched = number
        try:
            chosen = [member.examples[at] for at in member.steps[number - 1]]
            longest = max(len(example.input_ids) for example in chosen)
            if longest > self.settings.micro_batch_tokens:
                raise TuneforkError(
                    f"an example of {longest} tokens is longer than a pass of the group "
                    f"({self.settings.micro_batch_tokens})"
                )
            supervised = sum(int(example.supervised[1:].sum()) for example in chosen)
            if supervised == 0:
                raise TuneforkError(f"no token is supervised in {_names(chosen)}")
        except Exception as error:  # of this member's data, whatever it is: not the others' affair
            if not place.is_padding:
                # An unknown error's text may quote a row.
                why = str(error) if isinstance(error, TuneforkError) else type(error).__name__
                self._set_aside(slot, number, f"step {number}: its examples cannot be used: {why}")
            return None
        place.last = chosen
        if place.is_padding:
            return None
        rate = member.learning_rates[number - 1]
        return _Begun(slot, member.name, number, chosen, supervised, rate)

    def _update(self, part: _Begun) -> SlotUpdate:
        place = self.places[part.slot]
        member = place.member
        under_way = sum(b.slot == part.slot for p in self._pending for b in p.begun)
        return SlotUpdate(
            place.updates + under_way + 1,
            part.learning_rate,
            member.betas,
            member.weight_decay,
            member.max_grad_norm,
        )

    def _gradient(self, chosen: Sequence[Sequence[Encoded]], counts_g: Tensor) -> Tensor:
        """Each slot's loss (G,), its gradient added up; in smaller passes where memory wants."""
        longest = max(len(example.input_ids) for own in chosen for example in own)
        random = random_states(self.bank.device)
        while True:
            limit = max(self.limit, longest)
            batches = passes(
                chosen,
                max_tokens=limit,
                packing=self.settings.packing,
                pad_id=self.settings.pad_id,
                in_segments=self.runner.head.takes_segments,
            )
            try:
                total_g = torch.zeros(len(counts_g), device=self.bank.device)
                for batch in batches:
                    rows, width = batch.input_ids.shape
                    where = f"a group's pass of {rows} x {width} tokens"
                    total_g += self.runner.loss(self.runner.lay_out(batch), counts_g, where)
                return total_g
            except NoMemoryError:
                if self.settings.on_out_of_memory == "error" or limit == longest:
                    raise
            # Outside of `except`: the error holds the failed pass's tensors.
            self.runner.drop_graphs()
            self.optimizer.flat.gradient.zero_()
            restore_random(random, self.bank.device)
            self.limit = max(longest, limit // 2)

    def _collect(self, pending: _Pending) -> None:
        """Read a step's figures."""
        self._pending.remove(pending)
        if pending.arrived is not None:
            pending.arrived.synchronize()
        losses, norms = pending.figures.tolist()
        for part in pending.begun:
            place = self.places.get(part.slot)
            if place is None or place.member.name != part.name or place.is_padding:
                continue  # it left, or failed, meanwhile
            loss, norm = losses[part.slot], norms[part.slot]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._set_aside(
                    part.slot,
                    part.step,
                    f"step {part.step}: the loss is {loss} and the gradient's norm {norm}; the "
                    "weights were left as they were before the step. The step's rows: "
                    f"{_names(part.chosen)}. Lower train.learning_rate, mend or remove those rows, "
                    "or set train.precision: fp32",
                )
                continue
            self._record(place, part, loss, norm)

    def _record(self, place: _Place, part: _Begun, loss: float, norm: float) -> None:
        spike = place.watch.found(loss)
        now = time.perf_counter()
        done = place.progress
        place.progress = replace(
            done,
            step=part.step,
            tokens=done.tokens + sum(len(example.input_ids) for example in part.chosen),
            supervised_tokens=done.supervised_tokens + part.supervised,
            seconds=done.seconds + now - place.clock,
            losses=tuple(place.watch.losses),
        )
        place.clock = now
        place.updates += 1
        name, tokens = part.name, place.progress.tokens
        if spike is not None:
            message = f"step {part.step}: {spike} (rows {_names(part.chosen)})"
            self._events.append(MemberWarned(name, part.step, message))
        record = StepRecord(part.step, tokens, loss, part.learning_rate, norm)
        self._events.append(MemberStep(name, record))
        if part.step == len(place.member.steps):
            self.done[name] = MemberDone(name, place.progress)
            self._events.append(self.done[name])

    # Members come and go

    def _enter(self, slot: int, member: Member, start: State | None) -> None:
        progress, updates = Progress(), 0
        if start is not None:
            updates = put_in(self.bank, self.optimizer, slot, member, start)
            progress = start.progress
        self.places[slot] = _Place(
            member,
            progress,
            updates,
            progress.step,
            SpikeWatch(progress.losses),
            time.perf_counter(),
        )
        if member.steps and progress.step == len(member.steps):
            self.done[member.name] = MemberDone(member.name, progress)
            self._events.append(self.done[member.name])

    def _set_aside(self, slot: int, step: int, reason: str) -> None:
        place = self.places[slot]
        name = place.member.name
        self._states[name] = self._take_out(slot)
        self.failed[name] = MemberFailed(name, step, reason)
        self._events.append(self.failed[name])
        self._empty(slot)
        place.is_padding = True

    def _empty(self, slot: int) -> None:
        self.bank.clear(slot)
        self.optimizer.forget(slot)

    def _take_out(self, slot: int) -> State:
        place = self.places[slot]
        return take_out(self.bank, self.optimizer, slot, place.progress, place.updates)

    def state(self, name: str) -> State:
        """A member's own run between two steps, in host memory; a failed one's last good state."""
        self._settle()
        return self._states[name] if name in self._states else self._take_out(self.slot_of(name))

    def _settle(self) -> None:
        """Wait for what was launched; its events are told by the next step."""
        for pending in list(self._pending):
            self._collect(pending)

    def remove(self, name: str) -> State:
        """Free a member's slot, or a failed one's padding; returns its state.

        The others' passes have fewer tokens from here on.
        """
        state = self.state(name)
        self._states.pop(name, None)
        slot = next(s for s, place in self.places.items() if place.member.name == name)
        del self.places[slot]
        self._empty(slot)
        return state

    def add(self, member: Member, start: State | None = None) -> None:
        """Let a member join at the next step, going on from `start` if given.

        It takes a free slot that is large enough, or a failed one's. Where there is none the bank
        is cut anew, which costs a copy of everything, and on a GPU a compilation. Raises ModelError
        for an adapter that this bank cannot hold, and CheckpointError for another one's state.
        """
        if any(place.member.name == member.name for place in self.places.values()):
            raise ValueError(f"{member.name} is in the group already")
        self._settle()
        taken = {slot for slot, place in self.places.items() if not place.is_padding}
        free = [slot for slot in range(self.bank.num_slots) if slot not in taken]
        slot = next((s for s in free if self.bank.fits(s, member.lora)), None)
        if slot is None:
            slot = self._reshape(member)
        else:
            self.places.pop(slot, None)
            self._empty(slot)
        self.bank.start(slot, BankAdapter(member.lora, member.seed))
        try:
            self._enter(slot, member, start)
        except CheckpointError:
            self._empty(slot)
            raise

    def _reshape(self, member: Member) -> int:
        """Cut the bank anew for all who hold a slot, and `member`; returns its slot."""
        kept = [(p, self._take_out(s)) for s, p in self.places.items() if not p.is_padding]
        loras = [place.member.lora for place, _ in kept]
        self.bank.resize([*loras, member.lora])
        self.optimizer = BankAdamW(self.bank)
        self.runner.renew()
        for slot, (place, state) in enumerate(kept):
            self.bank.start(slot, BankAdapter(place.member.lora, place.member.seed))
            put_in(self.bank, self.optimizer, slot, place.member, state)
        self.places = {slot: place for slot, (place, _) in enumerate(kept)}
        return len(kept)

    def checkpoint(self, stores: Mapping[str, Checkpoints], *, wait: bool = True) -> None:
        """Save every member that `stores` has checkpoints for, all at this common moment.

        Each one's is an ordinary run's: the group goes on from all of them, or one alone.
        """
        self._settle()
        for name, store in stores.items():
            store.save_state(self.state(name), wait=wait)

    def _restore_random(self, state: State) -> None:
        torch.set_rng_state(state.tensors[f"{RANDOM}cpu"])
        if (on_gpu := state.tensors.get(f"{RANDOM}cuda")) is not None:
            torch.cuda.set_rng_state(on_gpu, self.bank.device)


def _names(examples: Sequence[Encoded]) -> str:
    named = ", ".join(example.source for example in examples[:_MOST_NAMED])
    more = len(examples) - _MOST_NAMED
    return f"{named} and {more} more" if more > 0 else named
