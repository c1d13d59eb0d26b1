"""What all members of a fleet share beside the base, and what one leaves in its run folder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch

from tunefork.model.device import forget_peak, peak_bytes, pick_device, process_bytes
from tunefork.model.identity import Identity
from tunefork.registry.run import RunRecord, read_record
from tunefork.sweep.group import Member
from tunefork.sweep.leave import shell
from tunefork.train.checkpoints import FOLDER as CHECKPOINTS
from tunefork.train.checkpoints import Checkpoints
from tunefork.train.loop import TrainResult
from tunefork.train.method import open_checkpoints
from tunefork.train.state import WEIGHTS, State
from tunefork.trial.artifact import save
from tunefork.trial.record import begin_record, check_base


@dataclass(slots=True)
class PeakMeter:
    """The most memory that passes took; what evaluates between them does not count."""

    device: torch.device
    bytes: int = 0

    def note(self) -> None:
        """A pass is over."""
        self.bytes = max(self.bytes, peak_bytes(self.device))

    def forget(self) -> None:
        """Something else took memory since."""
        forget_peak(self.device)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all members of a fleet share beside the base."""

    identity: Identity
    """Of the base."""
    tokenizer: Any
    device: torch.device
    say: Callable[[str], None]
    meter: PeakMeter

    @classmethod
    def of(cls, identity: Identity, tokenizer: Any, say: Callable[[str], None]) -> Self:
        """On this machine."""
        device = pick_device()
        return cls(identity, tokenizer, device, say, PeakMeter(device))

    def done(self, member: Member) -> RunRecord | None:
        """The record of a member that was trained and evaluated before.

        Raises IdentityError where the base has changed since.
        """
        record = read_record(member.folder)
        if record is None or record.status != "ok":
            return None
        check_base(record, self.identity, member.folder)
        return record

    def checkpoints(self, member: Member) -> Checkpoints:
        """A member's own, as those of a run of it alone."""
        return open_checkpoints(
            member.folder / CHECKPOINTS,
            member.examples,
            member.settled,
            member.recipe.method,
            base_sha256=self.identity.of_model(),
            learning_rate=member.learning_rate,
            seed=member.recipe.train.seed,
            device=self.device,
            say=self.say_of(member),
        )

    def leave(self, member: Member, state: State, status: str) -> RunRecord:
        """Save what a member has learnt: its artefact and its record."""
        recipe, done = member.settled, state.progress
        result = TrainResult(
            status="ok" if status == "ok" else "interrupted",
            steps=[],
            is_asked_to_stop=False,
            num_steps=done.step,
            kept_step=done.step,
            validation_loss=done.best_loss,
            tokens=done.tokens,
            supervised_tokens=done.supervised_tokens,
            seconds=max(done.seconds, 1e-9),
            peak_memory_bytes=self.meter.bytes,
            process_bytes=process_bytes(self.device),
        )
        record = begin_record(
            recipe,
            recipe.method,
            self.identity,
            seed=recipe.train.seed,
            learning_rate=member.learning_rate,
            result=result,
        )
        weights = {
            name.removeprefix(WEIGHTS): value
            for name, value in state.tensors.items()
            if name.startswith(WEIGHTS)
        }
        model = shell(recipe, weights)
        return save(model, self.tokenizer, recipe, record, member.folder, member.data)

    def dropped(self, member: Member) -> RunRecord | None:
        """The record of one that was dropped: what it learnt is left, to be gone on with alone."""
        record = read_record(member.folder)  # of an earlier call, maybe
        if record is None and (found := self.checkpoints(member).newest()) is not None:
            record = self.leave(member, found.read(), "interrupted")
        return record

    def say_of(self, member: Member) -> Callable[[str], None]:
        """`say`, which names the member."""
        return lambda line: self.say(f"{member.name}: {line}")
