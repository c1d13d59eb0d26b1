"""AdamW over what a method trains, and the learning rate's path.

LoRA's parameters are fp32 and take PyTorch's fused AdamW as it is (`adamw_lora.py`). Full
fine-tuning computes in bf16, where a nearest-rounded update below 1/256 of a weight is lost, so the
update happens on an fp32 *shadow* of each weight: kept (`fp32`, a master copy), or made for the
update and written back by stochastic rounding (`bf16`; `kernels/adamw.py`). One weight is updated
at a time, so that an fp32 gradient exists for one weight only, in memory that all of them take
turns in (on a CPU, fresh memory is dear).
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tunefork.kernels.adamw import keys_of, prepare, write_rounded_
from tunefork.kernels.quantized import AdamW8bit
from tunefork.train.clip import global_norm
from tunefork.train.optim_state import (
    by_first_part,
    check_indices,
    check_layout,
    check_moments,
    load_moments,
    moments,
)


class ShadowAdamW:
    """AdamW that updates bf16 or fp32 weights through fp32 shadows, one weight at a time."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        keep_shadows: bool,
        eight_bit: bool,
        betas: tuple[float, float],
        weight_decay: float,
        seed: int = 0,
    ) -> None:
        self.parameters = list(parameters)
        self.keep_shadows = keep_shadows
        self.seed = seed
        kind = AdamW8bit if eight_bit else torch.optim.AdamW
        self.counts = [0] * len(self.parameters)
        """Updates of each weight so far: what its rounding's random bits follow from."""
        self.shadows: list[nn.Parameter] = []
        self.inner: list[torch.optim.Optimizer] = []
        for parameter in self.parameters:
            shadow = nn.Parameter(parameter.detach().float() if keep_shadows else parameter[:0])
            options = {} if eight_bit else {"fused": True}
            decay = weight_decay if parameter.dim() >= 2 else 0.0
            self.shadows.append(shadow)
            self.inner.append(kind([shadow], betas=betas, weight_decay=decay, **options))
        if not keep_shadows and any(p.dtype != torch.float32 for p in self.parameters):
            prepare(self.parameters[0].device, only_rounds=True)

    def gradient_norm(self) -> float:
        """Global L2 norm."""
        return global_norm(self.parameters)

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update every weight that has a gradient, and free the gradient."""
        given = [p for p in self.parameters if p.grad is not None]
        for index, parameter in enumerate(self.parameters):
            self.counts[index] += parameter.grad is not None
        keys = {} if self.keep_shadows else self._keys()
        largest = max((p.numel() for p in given if p.dtype != torch.float32), default=0)
        gradient_room = torch.empty(largest, dtype=torch.float32, device=self.parameters[0].device)
        weight_room = gradient_room[:0] if self.keep_shadows else torch.empty_like(gradient_room)
        parts = zip(self.parameters, self.shadows, self.inner, strict=True)
        for index, (parameter, shadow, inner) in enumerate(parts):
            if parameter.grad is None:
                continue
            if not self.keep_shadows:
                shadow.data = _widen(parameter.detach(), weight_room)
            shadow.grad = _widen(parameter.grad, gradient_room)
            parameter.grad = None
            if gradient_scale != 1.0:
                shadow.grad.mul_(gradient_scale)
            inner.param_groups[0]["lr"] = learning_rate
            inner.step()
            shadow.grad = None
            if index in keys:
                write_rounded_(parameter, shadow, keys[index])
            else:
                parameter.copy_(shadow)
            if not self.keep_shadows:
                shadow.data = shadow.data.new_empty(0)

    def has_states(self) -> bool:
        """Whether a step was taken."""
        return any(inner.state for inner in self.inner)

    def forget(self) -> None:
        """Drop the states, as before the first step; shadows are made anew from the weights."""
        for inner in self.inner:
            inner.state.clear()
        self.counts = [0] * len(self.parameters)
        if self.keep_shadows:
            with torch.no_grad():
                for parameter, shadow in zip(self.parameters, self.shadows, strict=True):
                    shadow.copy_(parameter)

    def state_tensors(self) -> dict[str, Tensor]:
        """`N.MOMENT` and `N.shadow` of the weight at index N. Not copied."""
        found = {
            f"{index}.{name}": value
            for index, (shadow, inner) in enumerate(zip(self.shadows, self.inner, strict=True))
            for name, value in moments(inner, shadow).items()
        }
        if self.keep_shadows:
            found |= {f"{i}.shadow": shadow.detach() for i, shadow in enumerate(self.shadows)}
        return found

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave; raises CheckpointError before anything changes.

        The state of a generator, which rounding drew from in earlier versions, is passed over.
        """
        groups, shadows = by_first_part(tensors), dict[int, Tensor]()
        groups.pop("generator", None)
        for index, parameter in enumerate(self.parameters):
            found = groups.setdefault(str(index), {})
            if self.keep_shadows:
                shadows[index] = found.pop("shadow", torch.empty(0))
                wanted = {"shadow": (torch.float32, tuple(parameter.shape))}
                check_layout({"shadow": shadows[index]}, wanted, f"optimizer: weight {index}")
            inner = self.inner[index]
            check_moments(inner, parameter.shape, found, f"optimizer: weight {index}")
        check_indices(groups, len(self.parameters))
        for index, (shadow, inner) in enumerate(zip(self.shadows, self.inner, strict=True)):
            load_moments(inner, shadow, groups[str(index)])
            if self.keep_shadows:
                shadow.copy_(shadows[index])
            self.counts[index] = int(groups[str(index)].get("step", 0))

    def _keys(self) -> dict[int, Tensor]:
        """Of the random bits of each weight that is rounded in this step."""
        steps = {
            index: self.counts[index]
            for index, parameter in enumerate(self.parameters)
            if parameter.grad is not None and parameter.dtype != torch.float32
        }
        return keys_of(self.seed, steps, self.parameters[0].device)


def _widen(narrow: Tensor, room: Tensor) -> Tensor:
    """`narrow` in fp32: itself if it is, else a copy in `room`."""
    if narrow.dtype == torch.float32:
        return narrow
    return room[: narrow.numel()].view(narrow.shape).copy_(narrow)


def learning_rate_at(
    step: int, *, num_steps: int, peak: float, schedule: str, warmup_share: float
) -> float:
    """Learning rate of `step` (from 0): linear to `peak`, then cosine, linear or constant."""
    warmup = round(warmup_share * num_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, num_steps - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)
