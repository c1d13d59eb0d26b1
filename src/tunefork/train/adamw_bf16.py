"""AdamW with bf16 weights and bf16 moments, 4 bytes a weight beside it and its gradient.

Everything between two steps is in the weights, the moments and each weight's count of updates:
random bits are a function of seed, weight and count (`kernels/adamw.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunefork.kernels.adamw import Keys, factors_of, keys_of, prepare, update_bf16_
from tunefork.train.clip import global_norm
from tunefork.train.optim_state import Layout, by_first_part, check_indices, check_layout


@dataclass(slots=True)
class _Moments:
    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Bf16AdamW:
    """AdamW that keeps its moments in bf16 and rounds them and bf16 weights stochastically."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        seed: int = 0,
    ) -> None:
        self.parameters = list(parameters)
        self.betas = betas
        self.weight_decay = weight_decay
        self.seed = seed
        self.states: dict[int, _Moments] = {}
        self._keys: dict[int, Keys] = {}
        self._factors: dict[tuple[int, float], list[float]] = {}
        """Of a step, by a weight's own count of updates and its decay."""
        prepare(self.parameters)

    def gradient_norm(self) -> float:
        """Global L2 norm."""
        return global_norm(self.parameters)

    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update every weight that has a gradient, one at a time, and free the gradient."""
        due = [index for index, p in enumerate(self.parameters) if p.grad is not None]
        self.begin(learning_rate, gradient_scale, due)
        for index in due:
            self.update(index)

    def begin(
        self,
        learning_rate: float,
        gradient_scale: float = 1.0,
        due: Sequence[int] | None = None,
    ) -> None:
        """Make ready for one `update` of each weight of `due`; None: of any."""
        due = range(len(self.parameters)) if due is None else due
        steps = {index: self._count(index) + 1 for index in due}
        self._keys = keys_of(self.seed, steps)
        self._factors = {}
        for index, step in steps.items():
            form = (step, self._decay(index))
            if form not in self._factors:
                self._factors[form] = factors_of(
                    step,
                    learning_rate=learning_rate,
                    betas=self.betas,
                    weight_decay=form[1],
                    gradient_scale=gradient_scale,
                )

    def update(self, index: int) -> None:
        """Update the weight at `index` by its gradient, and free that; after `begin`."""
        parameter = self.parameters[index]
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if index not in self.states:
            empty = torch.zeros_like(parameter, dtype=torch.bfloat16)
            self.states[index] = _Moments(0, empty, empty.clone())
        state = self.states[index]
        state.step += 1
        factors = self._factors[state.step, self._decay(index)]
        moments = (state.exp_avg, state.exp_avg_sq)
        update_bf16_(parameter, gradient, *moments, factors, self._keys[index])

    def room(self, index: int) -> tuple[Tensor, ...]:
        """What `update` takes for itself: nothing."""
        return ()

    def _count(self, index: int) -> int:
        return self.states[index].step if index in self.states else 0

    def _decay(self, index: int) -> float:
        """As everywhere: vectors (norms, biases) take none."""
        return self.weight_decay if self.parameters[index].dim() >= 2 else 0.0

    def has_states(self) -> bool:
        """Whether a step was taken."""
        return bool(self.states)

    def forget(self) -> None:
        """Drop the states, as before the first step."""
        self.states.clear()

    def state_tensors(self) -> dict[str, Tensor]:
        """`N.step`, `N.exp_avg` and `N.exp_avg_sq` of the weight at index N; not copied."""
        found = dict[str, Tensor]()
        for index, state in sorted(self.states.items()):
            found[f"{index}.step"] = torch.tensor(state.step)
            found[f"{index}.exp_avg"] = state.exp_avg
            found[f"{index}.exp_avg_sq"] = state.exp_avg_sq
        return found

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave; raises CheckpointError before anything changes."""
        groups = by_first_part(tensors)
        check_indices(groups, len(self.parameters))
        for index, found in groups.items():
            moment = (torch.bfloat16, tuple(self.parameters[int(index)].shape))
            layout: Layout = {
                "step": (torch.int64, ()),
                "exp_avg": moment,
                "exp_avg_sq": moment,
            }
            check_layout(found, layout, f"optimizer: weight {index}")
        self.states = {
            int(index): _Moments(
                int(found["step"]),
                *(
                    found[name].to(self.parameters[int(index)].device, copy=True)
                    for name in ("exp_avg", "exp_avg_sq")
                ),
            )
            for index, found in groups.items()
        }
