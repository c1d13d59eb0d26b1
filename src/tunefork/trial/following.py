"""A run's events as it goes: into events.jsonl, to the trackers, and what is odd to whoever asks.

From entering to leaving, whatever ends the run: its last line says finished, failed or interrupted.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tunefork.errors import TuneforkError
from tunefork.model.device import used_bytes
from tunefork.recipe import Method, Recipe
from tunefork.train.checkpoints import Found
from tunefork.train.events import (
    EVENTS,
    CheckpointSaved,
    Event,
    EventLog,
    Resumed,
    SettingChanged,
    StepDone,
    Validated,
    Warned,
    event_log,
    read_steps,
)
from tunefork.train.loop import StepRecord
from tunefork.train.precision_choice import PrecisionChoice
from tunefork.train.rehearsal import Rehearsal
from tunefork.train.trackers import TrackerThread, open_trackers


@dataclass(slots=True)
class Following:
    """What a run tells of itself."""

    log: EventLog
    say: Callable[[str], None]
    settled: str | None = None
    """What the recipe left to the program (`auto`), and what it came to."""
    trackers: list[TrackerThread] = field(default_factory=list)
    tokens: int = 0
    since: float = field(default_factory=time.perf_counter)

    def precision_settled(self, choice: PrecisionChoice | None) -> None:
        """What `train.precision: auto` came to; said where finding it took time."""
        if choice is None:
            return
        told = f"train.precision: auto is {choice.precision}: {choice.why}"
        self.log.state("preparing", told)
        if choice.agreement is not None:
            self.say(told)

    def begin_training(
        self,
        folder: Path,
        recipe: Recipe,
        method: Method,
        *,
        seed: int,
        learning_rate: float,
        start: Found | None,
    ) -> None:
        """Training is about to begin, or to go on from `start`; opens the trackers."""
        if self.settled is not None and start is None and recipe.train.checkpointing != "none":
            self.say(self.settled)  # it costs time
        self.log.state("preparing", self.settled)
        if start is not None:
            self._resumed(start.facts.step, start.folder.name, "it was stopped")
        elif read_steps(folder / EVENTS):
            self._resumed(0, "", "it left no checkpoint")
        settings: dict[str, str | int | float] = {
            "model": recipe.model.id,
            "method": str(method),
            "seed": seed,
            "learning_rate": learning_rate,
            "batch_size": recipe.train.batch_size,
            "epochs": recipe.train.epochs,
        }
        if method is not Method.FULL:
            settings["rank"] = recipe.lora.rank
        self.trackers = open_trackers(
            recipe.train.trackers,
            folder,
            settings,
            lambda message: self.on_event(Warned(code="tracker", message=message)),
        )
        self.log.listeners += [tracker.listen for tracker in self.trackers]
        if recipe.train.rehearse:
            self.log.state("rehearsing")

    def begin_steps(self, tokens: int, found: Rehearsal | None) -> None:
        """Training begins, or goes on, after `tokens`."""
        if found is not None:
            self.say(str(found))
        self.log.state("training", None if found is None else str(found))
        self.tokens, self.since = tokens, time.perf_counter()

    def on_step(self, record: StepRecord, num_steps: int, device: torch.device) -> None:
        """One step was taken."""
        now = time.perf_counter()
        rate = (record.tokens - self.tokens) / max(now - self.since, 1e-9)
        self.tokens, self.since = record.tokens, now
        self.log.write(
            StepDone(
                step=record.step,
                num_steps=num_steps,
                tokens=record.tokens,
                loss=record.loss,
                learning_rate=record.learning_rate,
                grad_norm=record.grad_norm,
                tokens_per_s=rate,
                memory_bytes=used_bytes(device),
            )
        )

    def on_event(self, event: Event) -> None:
        """Something else happened; what a user should know is said too."""
        self.log.write(event)
        match event:
            case Validated():
                best = ", the best so far" if event.is_best else ""
                loss = f"{event.validation_loss:.4f}"
                self.say(f"step {event.step}: validation loss {loss}{best}")
            case Warned(message=message):
                self.say(f"warning: {message}")
            case SettingChanged():
                self.say(
                    f"warning: step {event.step}: {event.field} is {event.after} from here on, not "
                    f"{event.before}: {event.why}"
                )
            case Resumed():
                left_out = ", ".join(map(str, event.skipped_steps))
                self.say(
                    f"warning: {event.why}: back to {event.checkpoint}, and on without the rows of "
                    f"steps {left_out}"
                )

    def _resumed(self, step: int, checkpoint: str, why: str) -> None:
        self.log.write(Resumed(step=step, checkpoint=checkpoint, why=why))

    def on_written(self, folder: Path, num_bytes: int, seconds: float) -> None:
        """A checkpoint became visible."""
        name = f"{folder.parent.name}/{folder.name}"
        step = int(folder.name.rpartition("-")[2])
        self.log.write(CheckpointSaved(step=step, folder=name, bytes=num_bytes, seconds=seconds))


@contextmanager
def following(folder: Path, say: Callable[[str], None]) -> Iterator[Following]:
    """Follow a run in `folder` to its end, once it has said that it begins."""
    with event_log(folder) as log:
        told, before = Following(log, say), log.seq
        try:
            yield told
        except KeyboardInterrupt:
            if log.seq > before:  # else it was refused, and what is there is as it was
                log.state("interrupted")
            raise
        except Exception as error:
            if log.seq > before:
                log.state("failed", failure(error))
            raise
        finally:
            for tracker in told.trackers:
                tracker.close()


def failure(error: BaseException) -> str:
    """Why a run failed, for its record: our own errors never quote a row, a library's may."""
    return str(error) if isinstance(error, TuneforkError) else type(error).__name__
