"""The gradient of one optimiser step, from as many forward and backward passes as memory wants.

Each micro-batch's *summed* loss is divided by the supervised tokens of the whole step, and the
gradients add up: how the step is cut changes speed and memory, never the gradient. So a step that
ran out of memory may be taken again in smaller pieces, down to one row at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.data.pack import pack
from tunefork.errors import NoMemoryError
from tunefork.train.events import SettingChanged
from tunefork.train.runner import Laid, Runner


@dataclass(slots=True)
class Accumulator:
    """How a run's steps are cut into micro-batches; `limit` falls where memory says so."""

    runner: Runner
    limit: int
    """Most tokens of a micro-batch, padding included."""
    packing: bool
    pad_id: int
    on_out_of_memory: Literal["error", "shrink"] = "error"
    on_change: Callable[[SettingChanged], None] = lambda change: None
    _ahead: tuple[Sequence[Encoded], int, list[Laid]] | None = None
    """The next step's examples, the limit they were laid out for, and their micro-batches."""
    _pending: tuple[Tensor, str] | None = None
    """The loss of a step whose backward pass has not been run, and where that is."""

    def gradient(
        self, chosen: Sequence[Encoded], step: int, following: Sequence[Encoded] = ()
    ) -> tuple[Tensor, int]:
        """Add the gradient of step `step` to the parameters.

        `following`, the next step's examples, are laid out while a GPU is at work.

        Returns the mean loss, nats, fp32, which a GPU may still be computing, and the number of
        supervised tokens it is the mean of. Raises NoMemoryError where even the smallest
        micro-batches do not fit, or may not be tried.
        """
        longest = max(len(example.input_ids) for example in chosen)
        random = random_states(self.model.device)
        while True:
            limit = max(self.limit, longest)
            batches = self._take(chosen, limit)
            supervised = sum(laid.supervised for laid in batches)
            try:
                total = self._accumulate(batches, supervised, step)
                self._look_ahead(following)
                return total, supervised
            except NoMemoryError:
                is_least = self.on_out_of_memory == "error" or limit == longest
                if is_least and not self.runner.graphs:
                    raise
            # Outside of `except`: the error holds the failed pass's tensors.
            self._start_over(random)
            if is_least:
                self.runner.without_graphs()
                continue
            self.limit = max(longest, limit // 2)
            self.on_change(
                SettingChanged(
                    step=step,
                    field="train.micro_batch_tokens",
                    before=limit,
                    after=self.limit,
                    why="out of memory; the gradient is the same",
                )
            )

    def forward(self, chosen: Sequence[Encoded], step: int) -> tuple[float, int]:
        """`gradient` without the gradient, of a step of one micro-batch (`release.check_one_pass`):
        `backward` has it, or `drop` what is kept for it."""
        [laid] = self._take(chosen, max(self.limit, max(len(e.input_ids) for e in chosen)))
        where = _place(step, laid)
        loss = self.runner.forward(laid, laid.supervised, where)
        self._pending = (loss, where)
        return float(loss.detach()), laid.supervised

    def backward(self, following: Sequence[Encoded] = ()) -> None:
        """The backward pass of the last `forward`; raises NoMemoryError."""
        assert self._pending is not None
        (loss, where), self._pending = self._pending, None
        self.runner.backward(loss, where)
        self._look_ahead(following)

    def drop(self) -> None:
        """Give back what a step's backward pass would have needed, and its gradient."""
        self._pending = None
        self.model.zero_grad(set_to_none=True)

    def _look_ahead(self, following: Sequence[Encoded]) -> None:
        if following:
            needed = max(self.limit, max(len(e.input_ids) for e in following))
            self._ahead = (following, needed, self._lay_out(following, needed))

    def _lay_out(self, chosen: Sequence[Encoded], limit: int) -> list[Laid]:
        batches = pack(chosen, max_tokens=limit, packing=self.packing, pad_id=self.pad_id)
        return [self.runner.lay_out(batch) for batch in batches]

    def _take(self, chosen: Sequence[Encoded], limit: int) -> list[Laid]:
        """Micro-batches of at most `limit` tokens; those laid out ahead, where they are these."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[1] == limit:
            same = len(ahead[0]) == len(chosen)
            if same and all(a is b for a, b in zip(ahead[0], chosen, strict=True)):
                return ahead[2]
        return self._lay_out(chosen, limit)

    def _accumulate(self, batches: Sequence[Laid], supervised: int, step: int) -> Tensor:
        total = torch.zeros((), device=self.model.device)
        for laid in batches:
            total += self.runner.loss(laid, supervised, _place(step, laid))
        return total

    @property
    def model(self) -> PreTrainedModel:
        """What is trained."""
        return self.runner.model

    def _start_over(self, random: Sequence[torch.Tensor]) -> None:
        """Back to the step's start: no gradient, the same dropout."""
        self.runner.drop_graphs()
        self.model.zero_grad(set_to_none=True)
        restore_random(random, self.model.device)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def _place(step: int, laid: Laid) -> str:
    rows, width = laid.batch.input_ids.shape
    return f"step {step}, a micro-batch of {rows} x {width} tokens"


def random_states(device: torch.device) -> list[torch.Tensor]:
    """Of the generators that a step draws from: dropout's."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def restore_random(states: Sequence[torch.Tensor], device: torch.device) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
