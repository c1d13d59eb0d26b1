"""AdamW over what a method trains, and the learning rate's path.

LoRA's parameters are fp32 and take PyTorch's fused AdamW as it is (`adamw_lora.py`). Full
fine-tuning computes in bf16, where a nearest-rounded update below 1/256 of a weight is lost, so the
update happens on an fp32 *shadow* of each weight: kept (`fp32`, a master copy), or made for the
update and written back by stochastic rounding (`bf16`; `kernels/adamw.py`). One weight is updated
at a time, so that an fp32 gradient exists for one weight only, in memory that all of them take
turns in (on a CPU, fresh memory is dear). On a GPU a bf16 weight is updated at once, by one kernel
that takes no such memory; what it keeps has the names and layouts of PyTorch's AdamW.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tunefork.kernels.adamw import (
    Keys,
    factors_of,
    keys_of,
    prepare,
    prepare_wide,
    update_wide_,
    write_rounded_,
)
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
        self._keys: dict[int, Keys] = {}
        """Of the random bits of each weight that is rounded in a step."""
        self._learning_rate, self._gradient_scale = 0.0, 1.0
        self.shadows: list[nn.Parameter] = []
        self.inner: list[torch.optim.Optimizer] = []
        for parameter in self.parameters:
            shadow = nn.Parameter(parameter.detach().float() if keep_shadows else parameter[:0])
            options = {} if eight_bit else {"fused": True}
            decay = weight_decay if parameter.dim() >= 2 else 0.0
            self.shadows.append(shadow)
            self.inner.append(kind([shadow], betas=betas, weight_decay=decay, **options))
        self._is_at_once = [not eight_bit and _allows_at_once(p) for p in self.parameters]
        """Whether each weight is updated by `update_wide_`."""
        pairs = list(zip(self.parameters, self._is_at_once, strict=True))
        prepare_wide([p for p, is_at_once in pairs if is_at_once], keeps_shadows=keep_shadows)
        if not keep_shadows:
            narrow = [p for p, is_at_once in pairs if not is_at_once and p.dtype != torch.float32]
            prepare(narrow, only_rounds=True)

    def gradient_norm(self) -> float:
        """Global L2 norm."""
        return global_norm(self.parameters)

    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update every weight that has a gradient, and free the gradient."""
        due = [index for index, p in enumerate(self.parameters) if p.grad is not None]
        self.begin(learning_rate, gradient_scale, due)
        widened = [index for index in due if self._is_widened(index)]
        largest = max(widened, key=lambda index: self.parameters[index].numel(), default=None)
        room = () if largest is None else self.room(largest)
        for index in due:
            self.update(index, room)

    def begin(
        self,
        learning_rate: float,
        gradient_scale: float = 1.0,
        due: Sequence[int] | None = None,
    ) -> None:
        """Make ready for one `update` of each weight of `due`; None: of any."""
        self._learning_rate, self._gradient_scale = learning_rate, gradient_scale
        due = range(len(self.parameters)) if due is None else due
        rounded = [] if self.keep_shadows else due
        steps = {
            index: self.counts[index] + 1
            for index in rounded
            if self.parameters[index].dtype != torch.float32
        }
        self._keys = keys_of(self.seed, steps)

    @torch.no_grad()
    def update(self, index: int, room: tuple[Tensor, ...] | None = None) -> None:
        """Update the weight at `index` by its gradient, and free that; after `begin`.

        `room` is what `room` gave for a weight as large; None: taken for this one.
        """
        self.counts[index] += 1
        if self._is_at_once[index]:
            self._update_at_once(index)
        else:
            self._update_through_shadow(index, self.room(index) if room is None else room)

    def _update_at_once(self, index: int) -> None:
        parameter, shadow, inner = self.parameters[index], self.shadows[index], self.inner[index]
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        count, group, state = self.counts[index], inner.param_groups[0], inner.state[shadow]
        state["step"] = torch.tensor(float(count))  # on the host: it is read by checkpoints alone
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        factors = factors_of(
            count,
            learning_rate=self._learning_rate,
            betas=group["betas"],
            weight_decay=group["weight_decay"],
            gradient_scale=self._gradient_scale,
        )
        kept = shadow.detach() if self.keep_shadows else None
        keys = self._keys.get(index, (0, 0))
        moments = state["exp_avg"], state["exp_avg_sq"]
        update_wide_(parameter, gradient, *moments, factors, keys, kept)

    def _update_through_shadow(self, index: int, room: tuple[Tensor, ...]) -> None:
        parameter, shadow, inner = self.parameters[index], self.shadows[index], self.inner[index]
        assert parameter.grad is not None
        if not self.keep_shadows:
            shadow.data = _widen(parameter.detach(), room[1:])
        shadow.grad = _widen(parameter.grad, room)
        parameter.grad = None
        if self._gradient_scale != 1.0:
            shadow.grad.mul_(self._gradient_scale)
        inner.param_groups[0]["lr"] = self._learning_rate
        inner.step()
        shadow.grad = None
        if index in self._keys:
            write_rounded_(parameter, shadow, self._keys[index])
        else:
            parameter.copy_(shadow)
        if not self.keep_shadows:
            shadow.data = shadow.data.new_empty(0)

    def room(self, index: int) -> tuple[Tensor, ...]:
        """What `update` takes for itself: fp32 for a gradient, and a shadow that is not kept.

        Nothing for an fp32 weight, nor for one that is updated at once.
        """
        parameter = self.parameters[index]
        if not self._is_widened(index):
            return ()
        count = 1 if self.keep_shadows else 2
        return tuple(
            torch.empty(parameter.numel(), dtype=torch.float32, device=parameter.device)
            for _ in range(count)
        )

    def _is_widened(self, index: int) -> bool:
        return not self._is_at_once[index] and self.parameters[index].dtype != torch.float32

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


def _allows_at_once(parameter: Tensor) -> bool:
    """Whether `update_wide_` does it, and faster than PyTorch's fused AdamW on an fp32 copy."""
    is_narrow = parameter.dtype == torch.bfloat16
    return parameter.is_cuda and is_narrow and parameter.is_contiguous()


def _widen(narrow: Tensor, room: Sequence[Tensor]) -> Tensor:
    """`narrow` in fp32: itself if it is, else a copy in the first of `room`."""
    if narrow.dtype == torch.float32:
        return narrow
    return room[0][: narrow.numel()].view(narrow.shape).copy_(narrow)


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
