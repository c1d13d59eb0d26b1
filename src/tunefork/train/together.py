"""Many adapters trained over one base in the same passes, each as if it were alone.

    group = Group(bank, members, settings, runner=...)
    while group.is_at_work:
        for event in group.step():      # MemberStep, MemberWarned, MemberFailed, MemberDone
            ...
        group.add(...), group.remove(...)

A group step is one optimiser step of every live member: their examples share passes of at most
`micro_batch_tokens` tokens (`together_layout.py`), each member's summed loss is divided by its own
supervised tokens, and each has its own clipping, moments, learning rate and step count
(`adamw_bank.py`). So a member's weights are those of its run alone but for the order of sums; on a
GPU but for a rounding too: a run alone has its delta in the base's product (`bf16_product.py`,
`int8_product.py`), a group adds each member's to what is rounded.

Nothing of a member reaches another. One that fails (a loss or gradient that is not finite, an
example that cannot be read) is set aside with its reason; its slot is emptied and its tokens go on
as padding, so that no other member's bits change. `remove` frees a slot, `add` fills a free one
that is large enough, or else reshapes the group: then sums are cut up otherwise, and others agree
to float tolerance.

On a GPU the host does not wait: a step's figures are read when the next one is under way, and what
is sick has been held back on the device meanwhile. `drain` waits.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from tunefork.data.example import Encoded
from tunefork.errors import CheckpointError, TuneforkError
from tunefork.model.bank import Bank, BankAdapter
from tunefork.model.head import find_head
from tunefork.train.adamw_bank import BankAdamW
from tunefork.train.checkpoints import Checkpoints
from tunefork.train.guard import SpikeWatch, lost_gradient
from tunefork.train.kernels import attention_kernels
from tunefork.train.member import Member, MemberDone, MemberEvent, MemberFailed
from tunefork.train.runner import Runner
from tunefork.train.state import RANDOM, Progress, State
from tunefork.train.together_cut import GroupSettings, PassCut
from tunefork.train.together_layout import unsupervised
from tunefork.train.together_place import Begun, Pending, Place
from tunefork.train.together_state import put_in, take_out

__all__ = ["Group", "GroupSettings"]


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
        called = [member.name for member in members]
        if len(set(called)) < len(called):
            raise ValueError(f"two members of a group are called {max(called, key=called.count)}")
        self.bank, self.settings = bank, settings
        self.model = bank.model
        self.model.train()
        torch.manual_seed(members[0].seed)
        self.runner = runner or Runner(self.model, find_head(self.model), bank=bank)
        self.optimizer = BankAdamW(bank)
        self.cut = PassCut(self.runner, settings)
        self.reads_late = bank.device.type == "cuda"
        self.places: dict[int, Place] = {}
        self.failed: dict[str, MemberFailed] = {}
        self.done: dict[str, MemberDone] = {}
        self._states: dict[str, State] = {}
        self._pending: list[Pending] = []
        self._events: list[MemberEvent] = []
        for slot, member in enumerate(members):
            self._enter(slot, member, (starts or {}).get(member.name))
        for state in (starts or {}).values():  # one common moment: the same generators
            self._restore_random(state)

    # What is going on

    @property
    def live(self) -> list[str]:
        """Members with steps left."""
        return [p.member.name for p in self.places.values() if p.is_live]

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
        with attention_kernels():
            self._launch()
        self._settle(left=1 if self.reads_late and self.live else 0)
        return self._take_events()

    def drain(self) -> list[MemberEvent]:
        """Wait for what was launched, and tell of it."""
        self._settle()
        return self._take_events()

    def _take_events(self) -> list[MemberEvent]:
        events, self._events = self._events, []
        return events

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
        loss_g = self.cut.gradient(chosen, counts_g)
        updates = {p.slot: self.places[p.slot].update(p, self._under_way(p.slot)) for p in begun}
        norm_g = self.optimizer.step(updates, loss_g)
        self._pending.append(Pending.of(begun, torch.stack([loss_g, norm_g])))

    def _under_way(self, slot: int) -> int:
        return sum(part.slot == slot for pending in self._pending for part in pending.begun)

    def _next(self, slot: int, place: Place) -> Begun | None:
        """The next step of what is in `slot`; a failed member's moves its padding on."""
        if not place.go_on():
            return None
        try:
            part = place.read(slot, self.settings.micro_batch_tokens)
        except Exception as error:  # of this member's data, whatever it is: not the others' affair
            self._settle()  # the figures of its steps before
            if not place.is_padding:
                # An unknown error's text may quote a row.
                why = str(error) if isinstance(error, TuneforkError) else type(error).__name__
                step = place.launched
                self._set_aside(slot, step, f"step {step}: its examples cannot be used: {why}")
            return None
        return None if place.is_padding else part

    def _collect(self, pending: Pending) -> None:
        """Read a step's figures."""
        for part, loss, norm in pending.read():
            place = self.places.get(part.slot)
            if place is None or place.member.name != part.name or place.is_padding:
                continue  # it left, or failed, meanwhile
            if (why := part.sick(loss, norm)) is not None:
                is_lost = lost_gradient(loss, norm) is not None
                self._set_aside(part.slot, part.step, why, is_lost=is_lost)
                continue
            self._events += place.record(part, loss, norm)
            if part.step == len(place.member.steps):
                self.done[part.name] = MemberDone(part.name, place.progress)
                self._events.append(self.done[part.name])

    # Members come and go

    def _enter(self, slot: int, member: Member, start: State | None) -> None:
        progress, updates = Progress(), 0
        if start is not None:
            updates = put_in(self.bank, self.optimizer, slot, member, start)
            progress = start.progress
        self.places[slot] = Place(
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

    def _set_aside(self, slot: int, step: int, reason: str, *, is_lost: bool = False) -> None:
        place = self.places[slot]
        name = place.member.name
        self._states[name] = self._take_out(slot)
        self.failed[name] = MemberFailed(name, step, reason, is_lost)
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

    def _settle(self, left: int = 0) -> None:
        """Wait for what was launched, but for the last `left` steps; events are told later."""
        while len(self._pending) > left:
            self._collect(self._pending.pop(0))

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
