"""A member while it is in the group: its folder, its events, its checkpoints, and what it leaves.

All of it is what one run of `tunefork train` has (`trial/`); only the passes are shared.
"""

import math
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Self

from tunefork.evaluate.evaluate import evaluate, pad_id
from tunefork.evaluate.loss import loss_columns
from tunefork.evaluate.statistics import Columns
from tunefork.registry.claim import Claim, claimed
from tunefork.registry.run import RunRecord, read_record
from tunefork.sweep.bench import Bench
from tunefork.sweep.group import Group, Member
from tunefork.sweep.halving import mean_loss
from tunefork.train.checkpoints import FOLDER as CHECKPOINTS
from tunefork.train.checkpoints import Checkpoints, Found
from tunefork.train.events import Validated
from tunefork.train.interrupt import Interrupt
from tunefork.train.loop import StepRecord
from tunefork.train.state import Progress, State
from tunefork.trial.following import Following, following
from tunefork.trial.record import check_base, finish
from tunefork.trial.training import may_begin, record_failure


@dataclass(slots=True)
class Seat:
    """A member in the group."""

    member: Member
    bench: Bench
    stack: ExitStack
    told: Following
    checkpoints: Checkpoints
    start: Found | None
    progress: Progress = field(default_factory=Progress)
    state_bytes: int = 0
    """Of the last state that was saved."""

    def __post_init__(self) -> None:
        if self.start is not None:
            self.progress = self.start.facts.progress()

    @classmethod
    def open(cls, bench: Bench, member: Member, *, at_most: int | None) -> Self:
        """A member about to train, from its newest checkpoint on: of at most so many steps, where
        there is such a one still."""
        recipe, rate = member.recipe, member.learning_rate
        stack = ExitStack()
        try:
            claim = Claim(verb="train", data_sha256=member.data.fingerprint())
            stack.enter_context(claimed(member.folder, recipe, claim))
            told = stack.enter_context(following(member.folder, bench.say_of(member)))
            checkpoints = bench.checkpoints(member)
            checkpoints.on_written = told.on_written
            stack.enter_context(checkpoints)
            start = checkpoints.newest(at_most)
            if start is None and at_most is not None:
                start = checkpoints.newest()
            record = read_record(member.folder)
            if record is not None:
                check_base(record, bench.identity, member.folder)
            may_begin(member.folder, start, told.say)
            told.begin_training(
                member.folder,
                recipe,
                recipe.method,
                seed=recipe.train.seed,
                learning_rate=rate,
                start=start,
            )
        except BaseException:
            stack.close()
            raise
        return cls(member, bench, stack, told, checkpoints, start)

    def begin(self) -> State | None:
        """Training begins; returns the state to go on from."""
        self.told.begin_steps(self.progress.tokens, None)
        return None if self.start is None else self.start.read()

    def on_step(self, record: StepRecord) -> None:
        """A step was taken."""
        self.told.on_step(record, self.member.num_steps, self.bench.device)
        self.progress = replace(self.progress, step=record.step, tokens=record.tokens)

    def spend(self, seconds: float) -> None:
        """Its share of a pass's time."""
        self.progress = replace(self.progress, seconds=self.progress.seconds + seconds)

    def state(self, group: Group) -> State:
        """Between two steps, with the time and the validation that are kept here."""
        state = group.state(self.member.name)
        own = self.progress
        progress = replace(
            state.progress,
            seconds=own.seconds,
            best_step=own.best_step,
            best_loss=own.best_loss,
        )
        return replace(state, progress=progress)

    def validate(self, group: Group) -> Columns:
        """Measure the loss on the validation examples; one value each."""
        member, recipe = self.member, self.member.recipe
        with group.only(member.name) as model:
            columns = loss_columns(
                model,
                member.validation,
                max_tokens=recipe.train.micro_batch_tokens,
                packing=recipe.train.packing,
                pad_id=pad_id(self.bench.tokenizer),
            )
        loss, done = mean_loss([columns]), self.progress
        is_best = math.isfinite(loss) and (done.best_loss is None or loss < done.best_loss)
        self.told.on_event(Validated(step=done.step, validation_loss=loss, is_best=is_best))
        if is_best:
            self.progress = replace(done, best_step=done.step, best_loss=loss)
        return columns

    def finish(self, group: Group, interrupt: Interrupt) -> RunRecord:
        """Save, evaluate, and leave the folder as a finished run's.

        Its last state is a checkpoint first: killed from here on, only this is done again.
        Raises KeyboardInterrupt where the evaluation, which may take long, was interrupted.
        """
        member = self.member
        with self.stack:
            self.told.log.state("saving")
            self.save(group)
            record = self.bench.leave(member, self.state(group), "ok")
            self.told.log.state("evaluating")
            with interrupt.at_once(), group.only(member.name) as model:
                evaluation = evaluate(model, self.bench.tokenizer, member.data, member.recipe)
            self.bench.meter.forget()
            record = finish(evaluation, member.recipe, record, member.folder)
            self.told.log.state("finished")
        if member.recipe.train.checkpoints_when_done == "remove":
            shutil.rmtree(member.folder / CHECKPOINTS, ignore_errors=True)
        return record

    def save(self, group: Group) -> None:
        """A checkpoint of the state between two steps, unless there is one; on the disk then."""
        state = self.state(group)
        self.state_bytes = state.num_bytes()
        if state.progress.step:
            self.checkpoints.save_state(state, wait=True)

    def park(self, group: Group) -> None:
        """Leave the group for now, the state saved."""
        with self.stack:
            self.save(group)
            self.told.log.state("interrupted")

    def interrupt(self, group: Group) -> RunRecord:
        """Leave what was learnt so far, which is saved, as a run that was told to stop."""
        with self.stack:
            record = self.bench.leave(self.member, self.state(group), "interrupted")
            self.told.log.state("interrupted")
        return record

    def fail(self, error: Exception) -> RunRecord:
        """Record that `error` ended it; the others are untouched."""
        member, recipe = self.member, self.member.settled
        try:
            with self.stack:
                raise error
        except Exception as caught:
            if caught is not error:
                raise
        return record_failure(
            error,
            recipe,
            recipe.method,
            self.bench.identity,
            member.folder,
            seed=recipe.train.seed,
            learning_rate=member.learning_rate,
        )
