"""Gradient release: each weight is updated in the backward pass itself, and its gradient freed.

A gradient is complete when autograd has added up all that flows into it; the weight is then updated
at once, so that gradients, as many bytes as the weights, are never there together (Lv et al. 2023,
LOMO, https://arxiv.org/abs/2306.09782; with AdamW, whose update of a weight asks for no other's).
What is computed does not change: not the order of a weight's own sums, and its random bits hang on
its number and its count of updates alone. A weight that is still to be read, by a layer run again
or by a second use of a tied one, has no complete gradient yet; autograd itself refuses to go on
with a saved weight that was changed.

What has to be known before a weight moves cannot come from the whole gradient any more. The loss is
there after the forward pass, and the loop looks at it then. The gradient's norm is put together on
the way and read at the end: one that is not finite ends the run after the weights have moved.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.data.pack import arrange
from tunefork.errors import ModelError, RecipeError
from tunefork.model.layers import shared_weights
from tunefork.recipe import Checkpointing
from tunefork.train.clip import norm_of_parts, part_norms


class OneByOne(Protocol):
    """An optimiser whose update of a weight asks for no other's gradient."""

    parameters: list[nn.Parameter]

    def begin(self, learning_rate: float) -> None:
        """Make ready for at most one `update` of each weight."""

    def update(self, index: int) -> None:
        """Update the weight at `index` by its gradient, and free that."""

    def room(self, index: int) -> tuple[Tensor, ...]:
        """What `update` takes for itself."""


class Release:
    """While entered, gradients of `optimizer`'s weights are freed as they come.

    From `begin` to `end` each is used for its weight's update first; otherwise, in a rehearsal, it
    takes the room of one.
    """

    def __init__(self, optimizer: OneByOne) -> None:
        self.optimizer = optimizer
        self._is_updating = False
        self._parts: dict[int, Tensor] = {}
        """Norms of the gradients that came since `begin`, by the weight's number."""
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]
            for index, parameter in enumerate(self.optimizer.parameters)
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._is_updating = [], False

    def begin(self, learning_rate: float) -> None:
        """The next backward pass updates, at `learning_rate`."""
        self._parts, self._is_updating = {}, True
        self.optimizer.begin(learning_rate)

    def end(self) -> float:
        """Global L2 norm of the gradients since `begin`; the weights have moved by them."""
        self._is_updating = False
        parts = [self._parts[index] for index in sorted(self._parts)]
        self._parts = {}
        return norm_of_parts(parts)

    def dry_update(self) -> None:
        """An update by a gradient of zero at a rate of 0, one weight at a time."""
        self.optimizer.begin(0.0)
        for index, parameter in enumerate(self.optimizer.parameters):
            parameter.grad = torch.zeros_like(parameter)
            self.optimizer.update(index)

    def _hook(self, index: int) -> Callable[[nn.Parameter], None]:
        @torch.no_grad()
        def come(parameter: nn.Parameter) -> None:
            if not self._is_updating:
                self.optimizer.room(index)
                parameter.grad = None
                return
            if index in self._parts:
                raise RuntimeError(f"the gradient of trained weight {index} came in two parts")
            assert parameter.grad is not None
            self._parts[index] = part_norms(parameter.grad)
            self.optimizer.update(index)

        return come


def check_one_pass(
    examples: Sequence[Encoded],
    steps: Sequence[Sequence[int]],
    *,
    micro_batch_tokens: int,
    packing: bool,
) -> None:
    """Raise RecipeError where a step takes several micro-batches: its gradient is complete only
    after the last, and would have to be kept until then."""
    lengths = [[len(examples[at].input_ids) for at in step] for step in steps]
    for number, step in enumerate(lengths, start=1):
        limit = max(micro_batch_tokens, max(step))  # as the accumulator's: no example is cut
        count = len(arrange(step, max_tokens=limit, packing=packing))
        if count > 1:
            needed = max(_whole(other, micro_batch_tokens, packing) for other in lengths)
            raise RecipeError(
                f"full.gradient_release: step {number} of {len(steps)} takes {count} micro-batches "
                f"of train.micro_batch_tokens ({micro_batch_tokens}), and a gradient that is added "
                f"up over several has to be kept; set train.micro_batch_tokens: {needed}, lower "
                f"train.batch_size ({len(step)}), or leave full.gradient_release out"
            )


def _whole(lengths: Sequence[int], tokens: int, packing: bool) -> int:
    """The fewest tokens, of doublings of `tokens`, that hold a step's examples at once."""
    while max(lengths) > tokens or len(arrange(lengths, max_tokens=tokens, packing=packing)) > 1:
        tokens *= 2
    return tokens


def check_shared(model: PreTrainedModel, checkpointing: Checkpointing) -> None:
    """Raise ModelError for a weight of several layers whose backward passes are run one by one."""
    if checkpointing == "offload" and (shared := shared_weights(model)):
        raise ModelError(
            f"full.gradient_release: {shared[0]} is shared by several layers, each of which "
            "train.activation_checkpointing: offload differentiates by itself; set full"
        )
