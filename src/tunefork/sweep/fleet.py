"""Members that train together, each a run of its own: who is in, what each leaves, who waits.

A member comes in when there is room, trains in the group's passes, waits at its rungs for a
decision, and at its end leaves in its run folder what `tunefork train` leaves: artefact, record,
events, evaluation. One that fails is recorded and out; the others do not notice. Between passes the
state of all that are in is saved at one moment, which `moment.json` names once all of it is on the
disk: what was killed goes on from there, each member at the step that the others' go with.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tunefork.errors import DivergedError, TuneforkError
from tunefork.evaluate.statistics import Columns
from tunefork.registry.run import RunRecord
from tunefork.sweep.bench import Bench
from tunefork.sweep.group import Group, Member, Stepped
from tunefork.sweep.halving import mean_loss
from tunefork.sweep.live import LiveView
from tunefork.sweep.moments import Moments
from tunefork.sweep.parked import Parked
from tunefork.sweep.rungs import Rungs
from tunefork.sweep.seat import Seat
from tunefork.train.events import Warned
from tunefork.train.interrupt import Interrupt

_STOPPING = (
    "stopping after the pass at hand, to save what is trained; Ctrl-C again ends it at once, and "
    "the last saved states are gone on from"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a member ended."""

    status: Literal["ok", "dropped", "failed", "interrupted"]
    record: RunRecord | None
    error: str | None = None
    seconds: float = 0.0
    """Its share of the time of the passes that it took part in."""


@dataclass(slots=True)
class Fleet:
    """One group's members, from the first to the last."""

    group: Group
    bench: Bench
    view: LiveView
    has_room: Callable[[Sequence[Member], Member], bool]
    """Whether a member fits beside those that are in."""
    moments: Moments
    preemption_file: Path | None = None
    rungs: Rungs | None = None
    on_done: Callable[[Member, Outcome], None] = lambda member, outcome: None
    """Told of each member at its end."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    most: int = 0
    """That trained at one time."""
    _seats: dict[str, Seat] = field(default_factory=dict)
    _queue: deque[Member] = field(default_factory=deque)
    _moment: dict[str, int] = field(default_factory=dict)
    _unspent: float = 0.0
    """Seconds of passes whose steps are not told yet."""
    _parked: Parked = field(init=False)
    _interrupt: Interrupt = field(init=False)
    _is_cut_short: bool = False
    """What cannot end between two passes was."""
    _has_passed: bool = False

    def __post_init__(self) -> None:
        self._parked = Parked(self.rungs)
        self._interrupt = Interrupt(self.preemption_file, _STOPPING)

    @property
    def _is_stopping(self) -> bool:
        return self._interrupt.requested or self._is_cut_short

    def run(self, members: Sequence[Member]) -> dict[str, Outcome]:
        """Train `members` in order, as many at a time as there is room for.

        Ctrl-C and SIGTERM end it after the pass at hand: all that are in leave what they learnt, as
        `tunefork train` does, and every one that is not at its end is "interrupted". The first
        pass, which loads the base, and evaluations are cut short: nothing is lost with them. Raises
        what is no member's own fault (a full disk, a lack of memory).
        """
        self._moment = self.moments.read()
        # Those that were in come first, in their order: the passes go on as they would have.
        place = {name: at for at, name in enumerate(self._moment)}
        self._queue.extend(sorted(members, key=lambda member: place.get(member.name, len(place))))
        with self._interrupt:
            try:
                self._run()
            except KeyboardInterrupt as error:
                self._close(error)
                self._is_cut_short = True
            except BaseException as error:
                self._close(error)
                raise
        if self._is_stopping:
            for member in members:
                if member.name not in self.outcomes:  # wherever it was
                    self._end(member, Outcome("interrupted", None))
        if all(outcome.status != "interrupted" for outcome in self.outcomes.values()):
            self.moments.clear()
        return self.outcomes

    def _run(self) -> None:
        while self._queue or self._seats:
            self._admit()
            if self._seats:
                self._pass()
            if self._is_stopping:
                self._leave()
                return

    def _close(self, error: BaseException) -> None:
        for seat in self._seats.values():
            seat.stack.__exit__(type(error), error, error.__traceback__)

    def _admit(self) -> None:
        """Take in who is waiting, while there is room: at least one."""
        while self._queue:
            member, seated = self._queue[0], [seat.member for seat in self._seats.values()]
            if seated and not self.has_room(seated, member):
                return
            self._queue.popleft()
            try:
                if (record := self.bench.done(member)) is not None:
                    self._leave_out(member)
                    self._end(member, Outcome("ok", record))
                elif self._parked.keeps(member):
                    self.view.on_state(member.name, "parked")
                    self._decide()
                else:
                    self._seat(member)
            except TuneforkError as error:
                self._fail(member, None, error)

    def _seat(self, member: Member) -> None:
        at_most, passed = self._moment.get(member.name), self._parked.step_of(member)
        if passed is not None:
            at_most = max(at_most or 0, passed)
        seat = Seat.open(self.bench, member, at_most=at_most)
        try:
            self.group.add(member, seat.begin())
        except TuneforkError as error:
            self._fail(member, seat, error)
            return
        self._seats[member.name] = seat
        self.most = max(self.most, len(self._seats))
        step = seat.progress.step
        self.view.begin(member.name, step, seat.progress.tokens)
        if self._parked.is_past(member, step):
            self._leave_out(member)
        if step >= member.num_steps or self._parked.rung_at(member, step) is not None:
            self._arrive(
                seat, step
            )  # killed between what its step leads to and what says that it did

    def _pass(self) -> None:
        """A step of each, and what follows from it; the states are saved where that is due."""
        start = time.perf_counter()
        with nullcontext() if self._has_passed else self._interrupt.at_once():
            stepped = self.group.step()
        self._has_passed, seconds = True, time.perf_counter() - start
        self.bench.meter.note()
        has_left = self._take(stepped, start)
        if self.moments.is_due(self._seats.values(), has_left=has_left):
            self._take(self.group.sync(), time.perf_counter())
            self.moments.save(self._seats, self.group)
        self.view.on_pass(seconds)

    def _take(self, stepped: Sequence[Stepped], start: float) -> bool:
        """Hear of steps, whose passes began at `start`; returns whether a member left."""
        before = {name: seat.progress.tokens for name, seat in self._seats.items()}
        for each in stepped:
            if each.record is not None:
                self._seats[each.name].on_step(each.record)
                self.view.on_step(each.name, each.record)
        self._unspent += time.perf_counter() - start
        seen = {n: self._seats[n].progress.tokens - tokens for n, tokens in before.items()}
        total = sum(seen.values())
        if total:
            for name, tokens in seen.items():
                self._seats[name].spend(self._unspent * tokens / total)
            self._unspent = 0.0
        left = [each for each in stepped if self._settle(each)]
        return bool(left)

    def _settle(self, each: Stepped) -> bool:
        """What a member's step leads to; returns whether it left the group."""
        seat = self._seats[each.name]
        member = seat.member
        if each.warning is not None:
            seat.told.on_event(Warned(code="loss_spike", message=each.warning))
            return False
        if each.error is not None:
            del self._seats[each.name]
            self._fail(member, seat, each.error)
            return True
        assert each.record is not None
        return self._arrive(seat, each.record.step)

    def _arrive(self, seat: Seat, step: int) -> bool:
        """What follows on a step that a member has taken; returns whether it left the group."""
        member = seat.member
        every, is_last = member.recipe.train.validate_every_steps, step >= member.num_steps
        rung = self._parked.rung_at(member, step)
        is_due = is_last or rung is not None or (every is not None and step % every == 0)
        columns = None
        if member.validation and is_due:
            columns = seat.validate(self.group)
            loss = mean_loss([columns])
            self.view.on_validation(member.name, loss)
            if not math.isfinite(loss):
                why = f"step {step}: the loss on the validation examples is {loss}"
                del self._seats[member.name]
                self._fail(member, seat, DivergedError(f"{why}; lower train.learning_rate"))
                self.group.remove(member.name)
                return True
        if self._is_stopping:  # the same call comes to the rest
            return False
        if rung is not None and columns is not None:
            self._park(seat, rung, columns)
        elif is_last:
            self._finish(seat)
        return is_last or rung is not None

    def _park(self, seat: Seat, rung: int, columns: Columns) -> None:
        """A member waits at a rung, its state on the disk."""
        assert self.rungs is not None
        member = seat.member
        seat.park(self.group)
        self.group.remove(member.name)
        del self._seats[member.name]
        self._parked.members[member.name] = member
        self.view.on_state(member.name, "parked")
        self.rungs.reached(rung, member.name, columns)
        self._decide()

    def _decide(self) -> None:
        """Let those go on, or go, whose rung is decided."""
        going, dropped = self._parked.decided()
        for member in going:
            self.view.on_state(member.name, "waiting")
        self._queue.extendleft(reversed(going))
        for member in dropped:
            self._end(member, Outcome("dropped", self.bench.dropped(member)))

    def _leave_out(self, member: Member) -> None:
        """A member comes to no further rung: the others wait for it no longer."""
        self._parked.leave_out(member)
        self._decide()

    def _finish(self, seat: Seat) -> None:
        member = seat.member
        self.view.on_state(member.name, "evaluating")
        del self._seats[member.name]
        try:
            record = seat.finish(self.group, self._interrupt)
        except KeyboardInterrupt:  # its own state is saved; the others leave theirs
            self._is_cut_short = True
            self._end(member, Outcome("interrupted", None))
        except TuneforkError as error:
            self._end(member, Outcome("failed", None, str(error)))
        else:
            self._end(member, Outcome("ok", record))
        self.group.remove(member.name)

    def _fail(self, member: Member, seat: Seat | None, error: Exception) -> None:
        record = None if seat is None else seat.fail(error)
        seconds = 0.0 if seat is None else seat.progress.seconds
        self._end(member, Outcome("failed", record, str(error), seconds))
        self._leave_out(member)

    def _leave(self) -> None:
        """All that are in leave what they learnt; the rest is as it was."""
        self._take(self.group.sync(), time.perf_counter())
        self.moments.save(self._seats, self.group)
        for name, seat in list(self._seats.items()):
            self._end(seat.member, Outcome("interrupted", seat.interrupt(self.group)))
            del self._seats[name]

    def _end(self, member: Member, outcome: Outcome) -> None:
        self.outcomes[member.name] = outcome
        steps = None if outcome.record is None else outcome.record.num_steps
        self.view.on_state(member.name, outcome.status, steps)
        self.on_done(member, outcome)
