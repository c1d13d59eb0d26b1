"""Trained tensors that no gradient reaches: they learn nothing, whatever the loss does.

A loss falls without a few of its gradients too. So what a compiler loses of them (torch 2.11 lost
those of queries and keys once, and all of a LoRA in fp32), or a module that the architecture never
calls, shows in nothing else that is looked at.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunefork.train.events import Event, Warned
from tunefork.train.state import Optimizer

_AFTER = 16
"""Steps: a LoRA's A has no gradient in the first one, as B is zero then."""
_FEWEST = 3
_MOST_NAMED = 8
_FIRST_MOMENTS = ("absmax1", "state1", "exp_avg")
"""What tells of the first moment, the first of them that there is: 8-bit moments are codes, of
which zero is none, under their blocks' largest values."""


def is_due(number: int, num_steps: int) -> bool:
    """Whether optimiser step `number` of so many is the one to look after."""
    return number == min(_AFTER, num_steps) >= _FEWEST


def tell_unreached(
    model: PreTrainedModel,
    optimizer: Optimizer,
    step: int,
    on_event: Callable[[Event], None],
) -> None:
    """Warn of trained tensors that had no gradient in any step until now, by name."""
    if not (names := unreached(model, optimizer)):
        return
    count = len(optimizer.parameters)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    message = (
        f"in {step} steps no gradient has reached {len(names)} of {count} trained tensors: "
        f"{', '.join(names[:_MOST_NAMED])}{more}. They learn nothing; if the model does use them, "
        "report it, and set train.compile: never"
    )
    on_event(Warned(code="no_gradient", message=message, step=step))


@torch.no_grad()
def unreached(model: PreTrainedModel, optimizer: Optimizer) -> list[str]:
    """Names of what `optimizer` updates and has a first moment of zero for, or none."""
    by_index: dict[int, dict[str, Tensor]] = {}
    for key, value in optimizer.state_tensors().items():
        index, _, name = key.partition(".")
        if name in _FIRST_MOMENTS:
            by_index.setdefault(int(index), {})[name] = value
    moments = [_first(by_index.get(index, {})) for index in range(len(optimizer.parameters))]
    there = [moment.any() for moment in moments if moment is not None]
    reached = iter(torch.stack(there).tolist() if there else [])  # one wait for all
    lost = [
        parameter
        for parameter, moment in zip(optimizer.parameters, moments, strict=True)
        if moment is None or not next(reached)
    ]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names.get(id(parameter), "a tensor outside of the model") for parameter in lost]


def _first(state: dict[str, Tensor]) -> Tensor | None:
    return next((state[name] for name in _FIRST_MOMENTS if name in state), None)
