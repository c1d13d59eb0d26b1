"""What happens in a run, as JSON lines that another program can follow while it goes on.

events.jsonl in the run folder is appended to, one line an event, flushed at once. Every line has
`seq`, which grows by one from 1 over the life of the folder, through stops and resumptions; `time`,
ISO 8601 in UTC; and `event`, which says what else it has (the classes below are the schema). A kill
may leave half a line at the end: readers pass over it, and the next writer closes it off. Events
hold figures, file:line and settings, never the text of a row.

A resumed or rolled-back run takes some steps twice: of two lines of one step, the later one holds.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

EVENTS = "events.jsonl"

State = Literal[
    "preparing",
    "rehearsing",
    "training",
    "evaluating",
    "saving",
    "finished",
    "failed",
    "interrupted",
]


class _Event(BaseModel):
    # A later version may say more; whoever follows a run need not know it.
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class StateChanged(_Event):
    """The run goes into another state."""

    event: Literal["state"] = "state"
    state: State
    detail: str | None = None
    """What was found (`preparing`: what the recipe's `auto` came to; `training`: the rehearsal's
    line), or why it failed."""


class StepDone(_Event):
    """One optimiser step was taken."""

    event: Literal["step"] = "step"
    step: int
    """From 1."""
    num_steps: int
    """Of the whole run."""
    tokens: int
    """Seen since the start of the run, padding not counted."""
    loss: float
    """Mean over the step's supervised tokens, nats, before the update."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm before clipping."""
    tokens_per_s: float
    """Since the step before."""
    memory_bytes: int
    """In use now: CUDA memory allocated, or the process's resident set on a CPU."""


class Validated(_Event):
    """The loss on the validation examples was measured."""

    event: Literal["validation"] = "validation"
    step: int
    validation_loss: float
    """Mean over the supervised tokens, nats."""
    is_best: bool
    """Lower than at every validation before."""


class CheckpointSaved(_Event):
    """A resumable state became visible."""

    event: Literal["checkpoint"] = "checkpoint"
    step: int
    folder: str
    """Within the run folder."""
    bytes: int | None = None
    seconds: float | None = None


class Warned(_Event):
    """Something is odd; the run goes on."""

    event: Literal["warning"] = "warning"
    code: Literal["loss_spike", "no_gradient", "tracker", "checkpoint", "data", "other"]
    message: str
    step: int | None = None


class SettingChanged(_Event):
    """The run went on with another setting than its recipe's."""

    event: Literal["change"] = "change"
    step: int
    field: str
    before: int
    after: int
    why: str


class Resumed(_Event):
    """The run goes on from a checkpoint: after a stop, or rolled back."""

    event: Literal["resumed"] = "resumed"
    step: int
    """The last step that the checkpoint has taken; 0 from the start."""
    checkpoint: str
    """Its folder's name; empty from the start."""
    why: str
    skipped_steps: tuple[int, ...] = ()
    """Steps whose rows are left out from now on."""


Event = Annotated[
    StateChanged | StepDone | Validated | CheckpointSaved | Warned | SettingChanged | Resumed,
    Field(discriminator="event"),
]


class Line(_Event):
    """What every line has beside its event's own fields."""

    seq: int
    time: str
    what: Event


_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class EventLog:
    """Appends to events.jsonl, and hands each line to whoever listens (trackers)."""

    def __init__(self, file: Path) -> None:
        self.seq = max((line.seq for line in read_events(file)), default=0)
        is_torn = _ends_within_a_line(file)
        self.stream = file.open("a", encoding="utf-8", buffering=1)
        if is_torn:
            self.stream.write("\n")
        self.listeners: list[Callable[[Line], None]] = []
        self._lock = threading.RLock()  # a listener may write

    def write(self, event: Event) -> None:
        """One line; it can be read when this returns."""
        with self._lock:  # checkpoints are told of by the thread that writes them
            self.seq += 1
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            fields = {"seq": self.seq, "time": now} | event.model_dump(exclude_none=True)
            self.stream.write(json.dumps(fields) + "\n")
            for listen in self.listeners:
                listen(Line(seq=self.seq, time=now, what=event))

    def state(self, state: State, detail: str | None = None) -> None:
        """The run goes into `state`."""
        self.write(StateChanged(state=state, detail=detail))


@contextmanager
def event_log(folder: Path) -> Iterator[EventLog]:
    """The run folder's events, open for appending; one writer at a time (the claim sees to it)."""
    log = EventLog(folder / EVENTS)
    with log.stream:
        yield log


def read_events(file: Path) -> Iterator[Line]:
    """The lines of an events.jsonl, the one in the making and those not understood left out."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                fields = json.loads(text)
                yield Line(
                    seq=fields["seq"], time=fields["time"], what=_EVENT.validate_python(fields)
                )
            except (ValueError, ValidationError, KeyError, TypeError):
                continue


def read_steps(file: Path) -> list[StepDone]:
    """The steps of the run that an events.jsonl tells of, in order; each as it was last taken."""
    steps: dict[int, StepDone] = {}
    for line in read_events(file):
        match line.what:
            case StepDone() as done:
                steps[done.step] = done
            case Resumed() as resumed:
                steps = {step: done for step, done in steps.items() if step <= resumed.step}
    return [steps[step] for step in sorted(steps)]


def _ends_within_a_line(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size == 0:
        return False
    with file.open("rb") as stream:
        stream.seek(-1, 2)
        return stream.read(1) != b"\n"
