"""A run's checkpoints: when one is due, who writes it, which is taken up, which are kept.

A state that is small, or on a GPU, is copied to host memory and written by a thread while training
goes on, one at a time. A large one in host memory (full fine-tuning on a CPU) is written at once
from where it lies, as a copy of it would be memory that nobody planned for.
"""

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

import torch

from tunefork.errors import CheckpointError
from tunefork.train import checkpoint
from tunefork.train.checkpoint import Facts, Value
from tunefork.train.state import Optimizer, Progress, State, capture

FOLDER = "checkpoints"

_COPIED_ON_CPU_BYTES = 2**28
"""At most this much of a CPU's state is copied to be written in the background."""


@dataclass(frozen=True, slots=True)
class Policy:
    """When a checkpoint is due, and how many are kept."""

    every_s: float | None = None
    """Seconds from one that is on the disk to the next: begun earlier by what the last took."""
    every_steps: int | None = None
    keep: int = 2
    """The newest so many."""
    keep_best: bool = False
    """Also that of `Progress.best_step`."""


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that is whole and this run's own."""

    folder: Path
    facts: Facts

    def read(self) -> State:
        """Its state, in host memory."""
        return checkpoint.read(self.folder, self.facts)


def last_setting(folder: Path) -> dict[str, Value]:
    """The setting of the newest checkpoint in `folder` that can be read; {} where there is none.

    What a recipe leaves to the program (`auto`) is settled once, when the run begins: it goes on as
    it was begun.
    """
    for found in _newest_first(folder):
        with suppress(CheckpointError):
            return checkpoint.read_setting(found)
    return {}


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if checkpoint.step_of(path) is not None]
    return sorted(found, key=lambda path: checkpoint.step_of(path) or 0, reverse=True)


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints in `folder` of the run that `setting` tells of. Enter it to save.

    Leaving it waits for what is being written.
    """

    folder: Path
    setting: dict[str, Value]
    environment: dict[str, Value]
    policy: Policy = Policy()
    say: Callable[[str], None] = print
    on_written: Callable[[Path, int, float], None] = lambda folder, num_bytes, seconds: None
    """Told of each one that became visible, maybe on the writer's thread."""
    _began: float = field(default_factory=time.monotonic)
    _took_s: float = 0.0
    _writer: threading.Thread | None = None
    _error: BaseException | None = None
    _passed_over: set[str] = field(default_factory=set)

    def __enter__(self) -> Self:
        for leftover in self.folder.glob(f"{checkpoint.SCRATCH}*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._join()
        if kind is None:
            self.check()

    def newest(self, at_most: int | None = None) -> Found | None:
        """The newest checkpoint that is whole and of this run, after at most `at_most` steps; says
        which are passed over."""
        self._join()
        for folder in self._all():
            if at_most is not None and (checkpoint.step_of(folder) or 0) > at_most:
                continue
            try:
                facts = checkpoint.read_facts(folder)
                self._check_setting(folder, facts)
            except CheckpointError as error:
                self._passed_over.add(folder.name)
                self.say(f"warning: checkpoint passed over: {error}")
                continue
            self._say_environment(facts)
            return Found(folder, facts)
        return None

    def read(self, step: int) -> State:
        """The state after `step`, once it is on the disk. Raises CheckpointError."""
        self._join()
        self.check()
        folder = self.folder / checkpoint.folder_name(step)
        return checkpoint.read(folder, checkpoint.read_facts(folder))

    def is_due(self, done: Progress) -> bool:
        """Whether a checkpoint should follow on the finished step `done.step`."""
        step, every = done.step, self.policy.every_steps
        if self.policy.keep_best and step == done.best_step:
            return True
        if every is not None and step % every == 0:
            return True
        every_s = self.policy.every_s
        since = time.monotonic() - self._began
        is_time = every_s is not None and since >= every_s - self._took_s
        return is_time and not (self._writer and self._writer.is_alive())

    def save(
        self, model: torch.nn.Module, optimizer: Optimizer, progress: Progress, *, wait: bool
    ) -> None:
        """Make a checkpoint, on the disk when this returns if `wait`; removes the oldest.

        A policy of steps always waits: at most so many are lost, which those taken while a thread
        writes would be on top of.

        Raises CheckpointError where it, or the one before it, cannot be written.
        """
        state = capture(model, optimizer, progress, copy=False)
        device = next(model.parameters()).device
        is_copied = device.type != "cpu" or state.num_bytes() <= _COPIED_ON_CPU_BYTES
        copied = partial(capture, model, optimizer, progress) if is_copied else None
        self._save(state, copied, wait=wait)

    def save_state(self, state: State, *, wait: bool) -> None:
        """`save` of a state that is nobody else's, in host memory."""
        self._save(state, lambda: state, wait=wait)

    def _save(self, state: State, copied: Callable[[], State] | None, *, wait: bool) -> None:
        """`copied` is what a thread may write while the run goes on; None: nothing."""
        self._join()
        self.check()
        self._began = time.monotonic()
        if not state.is_sound():  # a run could not go on from it, and it would push sound ones out
            self.say(
                f"warning: step {state.progress.step}: weights are not finite; no checkpoint is "
                "made"
            )
            return
        if wait or copied is None or self.policy.every_steps is not None:
            self._write(state)
            return
        self._writer = threading.Thread(target=self._write_aside, args=(copied(),))
        self._writer.start()

    def check(self) -> None:
        """Raise what went wrong in the background, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def clear(self) -> None:
        """Remove all of them: the run is finished, and what it made is saved."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_aside(self, state: State) -> None:
        try:
            self._write(state)
        except BaseException as error:  # handed to the training thread, whatever it is
            self._error = error

    def _write(self, state: State) -> None:
        start = time.monotonic()
        made = checkpoint.write(
            state, self.folder, setting=self.setting, environment=self.environment
        )
        self.on_written(made, state.num_bytes(), time.monotonic() - start)
        self._took_s = time.monotonic() - self._began
        self._prune(state.progress)

    def _prune(self, done: Progress) -> None:
        """Keep the newest; what is damaged, or of steps that are being taken again, goes first."""
        newest, best = done.step, done.best_step if self.policy.keep_best else None
        good = []
        for folder in self._all():
            is_stale = (checkpoint.step_of(folder) or 0) > newest
            if is_stale or (
                folder.name in self._passed_over and checkpoint.step_of(folder) != newest
            ):
                checkpoint.discard(folder)
            else:
                good.append(folder)
        for folder in good[self.policy.keep :]:
            if checkpoint.step_of(folder) != best:
                checkpoint.discard(folder)

    def _all(self) -> list[Path]:
        return _newest_first(self.folder)

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _check_setting(self, folder: Path, facts: Facts) -> None:
        for name in self.setting | facts.setting:
            there, here = facts.setting.get(name), self.setting.get(name)
            if there != here:
                raise CheckpointError(f"{folder}: is of another run: {name} {there}, here {here}")

    def _say_environment(self, facts: Facts) -> None:
        for name in self.environment | facts.environment:
            there, here = facts.environment.get(name), self.environment.get(name)
            if there != here:
                self.say(
                    f"warning: the run began with {name} {there} and goes on with {here}: its bits "
                    "may differ from those of a run that was not stopped"
                )
