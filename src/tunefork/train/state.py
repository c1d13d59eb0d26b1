"""Everything that determines the next optimiser step, as named tensors and four numbers.

    weights/NAME     what is trained (adapters in fp32; full: the compute weights)
    optimizer/KEY    moments and step counts, fp32 shadows, the rounding's generator
    random/DEVICE    PyTorch's global generators, which dropout draws from

The learning rates, the order of the examples and how a step's are packed follow from the recipe,
the seed and the data, so that a state needs only the number of finished steps; a checkpoint records
and checks the rest (`checkpoint.py`). A step that was cut short is taken again from its start.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tunefork.errors import CheckpointError
from tunefork.train.optim_state import check_layout

WEIGHTS, OPTIMIZER, RANDOM = "weights/", "optimizer/", "random/"


class Optimizer(Protocol):
    """What the loop and a state ask of an optimiser."""

    parameters: list[nn.Parameter]

    def gradient_norm(self) -> float:
        """Global L2 norm of the gradients, fp32."""

    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update the parameters by their gradients times `gradient_scale`, and free or zero
        these."""

    def has_states(self) -> bool:
        """Whether a step was taken, so that the states are there."""

    def forget(self) -> None:
        """Drop the states, as before the first step."""

    def state_tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, but for the parameters; not copied."""

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave; raises CheckpointError and changes nothing where
        it does not fit."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come: all zero before its first step."""

    step: int = 0
    """Finished optimiser steps."""
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    """Spent on the finished steps, by all processes of the run."""
    micro_batch_tokens: int | None = None
    """Of the last step: a lack of memory may have made it less than the recipe's."""
    skipped: tuple[int, ...] = ()
    """Steps that are left out, for a loss spike (`recovery.py`)."""
    losses: tuple[float, ...] = ()
    """The last ones, by which a spike is told (`guard.py`)."""
    best_step: int = 0
    """After which the validation loss was lowest (`validation.py`); 0: none was measured."""
    best_loss: float | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A run between two steps."""

    progress: Progress
    tensors: dict[str, Tensor]

    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def is_sound(self) -> bool:
        """Whether every weight is finite."""
        weights = _below(WEIGHTS, self.tensors).values()
        return bool(torch.stack([weight.isfinite().all() for weight in weights]).all())


def capture(
    model: nn.Module, optimizer: Optimizer, progress: Progress, *, copy: bool = True
) -> State:
    """The state between two steps; in host memory, unless `copy` is false.

    Without a copy the tensors are the run's own: write them before the next step changes them.
    """
    tensors = {WEIGHTS + name: value.detach() for name, value in _trained(model).items()}
    tensors |= {OPTIMIZER + key: value for key, value in optimizer.state_tensors().items()}
    tensors |= {RANDOM + key: value for key, value in random_states_of(model).items()}
    if copy:
        tensors = {name: value.to("cpu", copy=True) for name, value in tensors.items()}
    return State(progress, tensors)


def restore(state: State, model: nn.Module, optimizer: Optimizer) -> Progress:
    """Put a run back to `state`, in place; returns how far it had come.

    Raises CheckpointError, and changes nothing, where the state is another model's or optimiser's.
    """
    trained = _trained(model)
    weights = _below(WEIGHTS, state.tensors)
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in trained.items()}
    check_layout(weights, layout, "weights")
    random = _below(RANDOM, state.tensors)
    _check_random(random, model)
    optimizer.load_state_tensors(_below(OPTIMIZER, state.tensors))
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(weights[name])
            value.grad = None
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], _device(model))
    return state.progress


def restore_weights(state: State, model: nn.Module) -> None:
    """Give `model` the weights of `state` alone; raises CheckpointError for another model's."""
    trained, weights = _trained(model), _below(WEIGHTS, state.tensors)
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in trained.items()}
    check_layout(weights, layout, "weights")
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(weights[name])


def digest(tensors: Mapping[str, Tensor], prefix: str = "") -> str:
    """SHA-256 of the names, types, shapes and bits of the tensors whose names start so."""
    whole = hashlib.sha256()
    for name in sorted(name for name in tensors if name.startswith(prefix)):
        value = tensors[name]
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        whole.update(_bytes(value).numpy().data)
    return whole.hexdigest()


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    cut = len(prefix)
    return {name[cut:]: value for name, value in tensors.items() if name.startswith(prefix)}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def random_states_of(model: nn.Module) -> dict[str, Tensor]:
    """Of PyTorch's global generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if _device(model).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(_device(model))
    return states


def _check_random(found: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise CheckpointError unless `found` is what generators of the run's devices can take."""
    own = random_states_of(model)
    check_layout(
        found, {name: (v.dtype, tuple(v.shape)) for name, v in own.items()}, "random states"
    )
    for name, value in found.items():
        device = _device(model) if name == "cuda" else torch.device("cpu")
        check_generator(value, device, f"random states: {name}")


def check_generator(state: Tensor, device: torch.device, what: str) -> None:
    """Raise CheckpointError where a generator on `device` would refuse `state`."""
    try:
        torch.Generator(device).set_state(state)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{what} is no generator's state ({error})") from error


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two states first differ, in the order of the tensors' names."""

    name: str
    index: tuple[int, ...] | None
    """None: one has no such tensor, or of another shape or type."""
    left: str
    right: str
    num_tensors: int
    """That differ."""


def first_difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Difference | None:
    """None where all bits are equal."""
    names = sorted(left.keys() | right.keys())
    unequal = [name for name in names if not _same(left.get(name), right.get(name))]
    if not unequal:
        return None
    name, count = unequal[0], len(unequal)
    a, b = left.get(name), right.get(name)
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return Difference(name, None, _kind(a), _kind(b), count)
    at = int((_bytes(a) != _bytes(b)).nonzero()[0]) // a.element_size()
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), a.shape))
    shown = [repr(x.reshape(-1)[at].item()) for x in (a, b)]
    return Difference(name, index, shown[0], shown[1], count)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _kind(value: Tensor | None) -> str:
    return "absent" if value is None else f"{tuple(value.shape)} in {value.dtype}"
