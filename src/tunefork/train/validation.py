"""When is a run at its best? The loss on examples held back from training, every so many steps.

They are cut off the training examples; the evaluation's are used for no choice. A validation draws
no random number and changes no state, so that the steps are those of a run without one on the same
examples. With `keep: best` the state with the lowest loss so far is among the checkpoints, and is
what the run leaves.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.data.pack import pack
from tunefork.errors import CheckpointError
from tunefork.model.head import Head
from tunefork.train.checkpoints import Checkpoints
from tunefork.train.events import Event, Validated, Warned
from tunefork.train.loss import token_losses
from tunefork.train.state import Progress, restore_weights


@dataclass(frozen=True, slots=True)
class Validation:
    """What is validated on, how often, and whether the best state is kept."""

    examples: Sequence[Encoded]
    every: int
    """Optimiser steps; the last step is always validated."""
    keep_best: bool
    max_tokens: int
    """In one forward pass, padding included."""
    packing: bool
    pad_id: int
    on_event: Callable[[Event], None] = lambda event: None

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether finished step number `step` is followed by a validation."""
        return step % self.every == 0 or step == num_steps

    def measure(self, model: PreTrainedModel, head: Head, done: Progress) -> Progress:
        """Validate the state after `done.step`; returns `done`, with the best so far."""
        loss = self._loss(model, head)
        is_best = math.isfinite(loss) and (done.best_loss is None or loss < done.best_loss)
        self.on_event(Validated(step=done.step, validation_loss=loss, is_best=is_best))
        return replace(done, best_step=done.step, best_loss=loss) if is_best else done

    def _loss(self, model: PreTrainedModel, head: Head) -> float:
        """Mean over the supervised tokens, nats."""
        batches = pack(
            self.examples, max_tokens=self.max_tokens, packing=self.packing, pad_id=self.pad_id
        )
        total = torch.zeros((), dtype=torch.float64)
        model.eval()
        for batch in batches:
            total += token_losses(model, head, batch.to(model.device)).double().sum().cpu()
        model.train()
        return float(total) / sum(len(batch.supervised[0]) for batch in batches)


def go_back_to_best(
    model: PreTrainedModel,
    checkpoints: Checkpoints,
    done: Progress,
    on_event: Callable[[Event], None],
) -> int:
    """Give `model` the weights of its best validated state; returns that state's step.

    Where its checkpoint is damaged, the last state is kept, and that is said.
    """
    if done.best_step == done.step or done.best_loss is None:
        return done.step
    try:
        restore_weights(checkpoints.read(done.best_step), model)
    except CheckpointError as error:
        message = f"the best state is lost ({error}); the last one is kept in its place"
        on_event(Warned(code="checkpoint", step=done.step, message=message))
        return done.step
    return done.best_step
