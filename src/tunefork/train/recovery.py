"""What a run does about a sick step: stop with its last good state saved, or go back and around.

A step whose loss or gradient is not finite never reaches the weights; the state of before it is
saved as a checkpoint (weights, optimiser, random states), and the run fails. Where every row of the
step is sick it is the weights that are: they are not saved, as the same command would go on from
them for ever, and the checkpoint before them stays the newest. A loss spike is said;
with `rollback` the run goes back to its last checkpoint and leaves out the rows of the steps around
the spike, as was done by hand for PaLM (Chowdhery et al. 2022, section 5.1,
https://arxiv.org/abs/2204.02311: about 100 steps back, 200 to 500 batches skipped; the rows alone
were harmless elsewhere, so it is those rows with that state of the weights). Here it is the spike's
step and up to `_BEFORE` before it: what hurt the weights came before what shows it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from tunefork.data.example import Encoded
from tunefork.errors import CheckpointError, DivergedError, NoGradientError
from tunefork.train.accumulate import Accumulator, restore_random
from tunefork.train.checkpoints import Checkpoints
from tunefork.train.events import Event, Resumed, Warned
from tunefork.train.guard import LOST_GRADIENT_ADVICE, blame
from tunefork.train.out_of_memory import Remedies
from tunefork.train.state import Optimizer, Progress, restore

_ADVICE = "Lower train.learning_rate, mend or remove those rows, or set train.precision: fp32"
_ADVICE_AFTER = (
    "Set full.gradient_release: false to stop before the update and be told which row it is; or "
    "lower train.learning_rate, or mend or remove those rows"
)
_BEFORE = 3
_MOST_ROLLBACKS = 3


@dataclass(frozen=True, slots=True)
class OnFault:
    """How a run meets faults: the recipe's `train.on_...`, and who is told."""

    out_of_memory: Literal["error", "shrink"] = "error"
    loss_spike: Literal["warn", "rollback", "stop"] = "warn"
    remedies: Remedies | None = None
    on_event: Callable[[Event], None] = lambda event: None


JUST_STOP = OnFault()


@dataclass(slots=True)
class Recovery:
    """Of one run."""

    cut: Accumulator
    optimizer: Optimizer
    checkpoints: Checkpoints | None
    on_fault: OnFault
    releases: bool = False
    """Weights move in the backward pass (`release.py`), and no gradient is kept."""
    rollbacks: int = 0
    last_spike: int = -1

    def stop(
        self,
        what: str,
        done: Progress,
        random: Sequence[Tensor],
        chosen: Sequence[Encoded],
        *,
        find_rows: bool,
        is_lost: bool = False,
    ) -> DivergedError:
        """The error that ends the run before its next update; a good state before it is saved.

        `is_lost`: there is no gradient, which is no fault of the rows.
        """
        model, step = self.cut.model, done.step + 1
        self.cut.drop()
        found = None
        if find_rows:
            found = blame(model, chosen, pad_id=self.cut.pad_id, backward=not self.releases)
        restore_random(random, model.device)
        if found is not None and found.is_weights:
            saved = ", and not saved: a checkpoint before, if there is one, is gone on from"
        else:
            saved = self._save(done)
        names = ", ".join(e.source for e in chosen[:16])
        rows = f"The step's rows: {names}" if found is None else found.said
        error, advice = _kind(is_lost, _ADVICE)
        return error(
            f"step {step}: {what}; the weights were left as they were before the step{saved}. "
            f"{rows[0].upper()}{rows[1:]}. {advice}"
        )

    def stop_after(
        self, what: str, done: Progress, chosen: Sequence[Encoded], *, is_lost: bool = False
    ) -> DivergedError:
        """`stop`, of a step that moved the weights before what is sick of it could be seen."""
        found = None if self.checkpoints is None else self.checkpoints.newest()
        then = "starts anew, as there is no checkpoint yet"
        if found is not None:
            then = f"goes on from {found.folder.name}, the newest checkpoint"
        names = ", ".join(e.source for e in chosen[:16])
        error, advice = _kind(is_lost, _ADVICE_AFTER)
        return error(
            f"step {done.step + 1}: {what}; with full.gradient_release weights had moved by it "
            f"already, so nothing was saved, and the same command {then}. The step's rows: "
            f"{names}. {advice}"
        )

    def spike(
        self,
        what: str,
        done: Progress,
        random: Sequence[Tensor],
        chosen: Sequence[Encoded],
    ) -> Progress | None:
        """None where the run takes the step all the same; else from where it goes on.

        Raises DivergedError where it stops.
        """
        step, wish = done.step + 1, self.on_fault.loss_spike
        is_new, self.last_spike = step != self.last_spike + 1, step
        if wish == "warn":
            if is_new:
                rows = ", ".join(e.source for e in chosen[:16])
                self._warn(step, f"{what} (rows {rows})")
            return None
        if wish == "stop":
            raise self.stop(what, done, random, chosen, find_rows=False)
        if self.rollbacks == _MOST_ROLLBACKS:
            what = f"{what}, after {self.rollbacks} rollbacks"
            raise self.stop(what, done, random, chosen, find_rows=False)
        self.rollbacks += 1
        self.cut.drop()
        return self._go_back(step, what, done)

    def _go_back(self, step: int, what: str, done: Progress) -> Progress:
        found = None if self.checkpoints is None else self.checkpoints.newest()
        if found is None:
            self._warn(step, f"{what}; there is no checkpoint yet, so only its rows are left out")
            return replace(done, skipped=(*done.skipped, step))
        back = restore(found.read(), self.cut.model, self.optimizer)
        first = max(back.step + 1, step - _BEFORE)
        skipped = tuple(sorted({*done.skipped, *range(first, step + 1)}))
        self.on_fault.on_event(
            Resumed(
                step=back.step,
                checkpoint=found.folder.name,
                why=f"step {step}: {what}",
                skipped_steps=tuple(range(first, step + 1)),
            )
        )
        return replace(back, skipped=skipped)

    def _save(self, done: Progress) -> str:
        if self.checkpoints is None or done.step == 0:
            return ""
        try:
            self.checkpoints.save(self.cut.model, self.optimizer, done, wait=True)
        except CheckpointError as error:
            return f", and could not be saved ({error})"
        return f", and saved as a checkpoint of step {done.step}"

    def _warn(self, step: int, message: str) -> None:
        self.on_fault.on_event(
            Warned(code="loss_spike", step=step, message=f"step {step}: {message}")
        )


def _kind(is_lost: bool, advice: str) -> tuple[type[DivergedError], str]:
    """What is raised, and what to do."""
    return (NoGradientError, LOST_GRADIENT_ADVICE) if is_lost else (DivergedError, advice)
