"""AdamW over LoRA's parameters: all fp32, updated by one fused call.

Checkpoints hold each parameter's own moments, so that they do not hang on how these lie in memory.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tunefork.errors import CheckpointError
from tunefork.train.flat import FlatParameters
from tunefork.train.optim_state import (
    by_first_part,
    check_indices,
    check_moments,
    load_moments,
    moments,
)


class LoraAdamW:
    """PyTorch's fused AdamW over fp32 parameters in one flat tensor (`flat.py`).

    Their gradients are there all the time. A parameter without one has a zero one, so its moments
    decay and it moves on by them; all have one step count.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self.flat = FlatParameters(parameters)
        self.parameters = self.flat.parameters
        self.inner = torch.optim.AdamW(
            [self.flat.values], betas=betas, weight_decay=weight_decay, fused=True
        )
        self._is_attached = False
        """Since `gradient_norm`, behind whose wait a GPU has nothing to do: to look at 448
        parameters takes the host 0.2 ms."""

    def attach_gradients(self) -> None:
        """Make every parameter's gradient the view again; to be called before a graph capture."""
        self.flat.attach_gradients()
        self._is_attached = False

    def gradient_norm(self) -> float:
        """Global L2 norm; until `step` gradients are left as they are."""
        self.flat.attach_gradients()
        self._is_attached = True
        return float(self.flat.norm())

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update every parameter, and zero the gradients."""
        if not self._is_attached:
            self.flat.attach_gradients()
        self._is_attached = False
        if gradient_scale != 1.0:
            self.flat.gradient.mul_(gradient_scale)
        self.inner.param_groups[0]["lr"] = learning_rate
        self.inner.step()
        self.flat.gradient.zero_()

    def has_states(self) -> bool:
        """Whether a step was taken."""
        return bool(self.inner.state)

    def forget(self) -> None:
        """Drop the states, as before the first step."""
        self.inner.state.clear()

    def state_tensors(self) -> dict[str, Tensor]:
        """`N.MOMENT` of the parameter at index N; not copied."""
        found = dict[str, Tensor]()
        for name, value in moments(self.inner, self.flat.values).items():
            count = len(self.parameters)
            parts = self.flat.views(value) if value.dim() else [value] * count
            found |= {f"{index}.{name}": part for index, part in enumerate(parts)}
        return found

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave; raises CheckpointError before anything changes."""
        groups = by_first_part(tensors)
        for index, parameter in enumerate(self.parameters):
            found = groups.setdefault(str(index), {})
            check_moments(self.inner, parameter.shape, found, f"optimizer: weight {index}")
        check_indices(groups, len(self.parameters))
        counts = {float(found["step"]) for found in groups.values() if found}
        if len(counts) > 1:
            raise CheckpointError(
                f"optimizer: weights were updated {sorted(counts)} times, and this version updates "
                "all of them together; start the run anew"
            )
        load_moments(self.inner, self.flat.values, self._flattened(groups) if counts else {})

    def _flattened(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The moments laid out as the parameters are; those of a weight that had none are zero."""
        known = next(found for found in groups.values() if found)
        flat = {"step": known["step"]}
        for name in known.keys() - {"step"}:
            flat[name] = torch.zeros_like(self.flat.values, device="cpu")
            for index, part in enumerate(self.flat.views(flat[name])):
                if found := groups[str(index)]:
                    part.copy_(found[name])
        return flat
