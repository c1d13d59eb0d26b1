"""AdamW's state of one weight as named tensors: what a checkpoint holds of an optimiser.

PyTorch keeps a step count and two moments in fp32. bitsandbytes keeps the moments of weights of
4,096 values or more in 8 bits, by blocks of 256: codes, the map that gives each code its value, and
each block's absolute maximum (Dettmers et al. 2021, https://arxiv.org/abs/2110.02861); its step
count is a Python int. A weight that has had no gradient yet has no state.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tunefork.errors import CheckpointError
from tunefork.kernels.quantized import AdamW8bit

_LEAST_8BIT_VALUES = 4096
_BLOCK = 256

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def moments(inner: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What `inner` holds of `parameter`, by its own names; not copied."""
    return {
        name: value if isinstance(value, Tensor) else torch.tensor(value)
        for name, value in inner.state.get(parameter, {}).items()
    }


def check_moments(
    inner: torch.optim.Optimizer, shape: torch.Size, found: Mapping[str, Tensor], what: str
) -> None:
    """Raise CheckpointError unless `found` is a state that `inner` could hold of such a weight."""
    check_layout(found, _layout(inner, tuple(shape)) if found else {}, what)


def load_moments(
    inner: torch.optim.Optimizer, parameter: Tensor, found: Mapping[str, Tensor]
) -> None:
    """Put a checked state in place of what `inner` holds of `parameter`."""
    if not found:
        inner.state.pop(parameter, None)
        return
    state = inner.state[parameter]
    for name, value in found.items():
        if isinstance(inner, AdamW8bit) and name == "step":
            state[name] = int(value)
        elif isinstance(held := state.get(name), Tensor):
            held.copy_(value)
        else:
            state[name] = value.to(parameter.device, copy=True)


def by_first_part(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`{"3.step": x}` as `{"3": {"step": x}}`."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        first, _, rest = key.partition(".")
        groups.setdefault(first, {})[rest] = value
    return groups


def check_indices(groups: Mapping[str, object], count: int) -> None:
    """Raise CheckpointError for a weight that this run does not train."""
    for index in groups.keys() - {str(i) for i in range(count)}:
        raise CheckpointError(f"optimizer: has {index}, and this run trains {count} weights")


def check_layout(found: Mapping[str, Tensor], wanted: Layout, what: str) -> None:
    """Raise CheckpointError unless the tensors of `found` are those `wanted`."""
    if found.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        faults = [f"lacks {missing[0]}"] if missing else []
        faults += [f"has {extra[0]}, which this run has not"] if extra else []
        raise CheckpointError(f"{what}: {', '.join(faults)}")
    for name, (dtype, shape) in wanted.items():
        value = found[name]
        if (value.dtype, tuple(value.shape)) != (dtype, shape):
            raise CheckpointError(
                f"{what}: {name} is {tuple(value.shape)} in {value.dtype}, not {shape} in {dtype}"
            )


def _layout(inner: torch.optim.Optimizer, shape: tuple[int, ...]) -> Layout:
    if not isinstance(inner, AdamW8bit):
        wide = (torch.float32, shape)
        return {"step": (torch.float32, ()), "exp_avg": wide, "exp_avg_sq": wide}
    numel = torch.Size(shape).numel()
    is_small = numel < _LEAST_8BIT_VALUES
    codes = (torch.float32 if is_small else torch.uint8, shape)
    layout: Layout = {"step": (torch.int64, ()), "state1": codes, "state2": codes}
    if not is_small:
        blocks = (-(-numel // _BLOCK),)
        for number in (1, 2):
            layout[f"qmap{number}"] = (torch.float32, (256,))
            layout[f"absmax{number}"] = (torch.float32, blocks)
    return layout
