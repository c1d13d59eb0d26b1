"""What is planned: one method, the model it trains, and where; what a pass of it takes there."""

from dataclasses import dataclass, replace
from typing import Any

from tunefork.plan.built import Build
from tunefork.plan.device import Target
from tunefork.plan.memory import Memory, measure
from tunefork.plan.one_pass import Step
from tunefork.plan.passes import Shape
from tunefork.plan.step import trace_step
from tunefork.recipe import Method
from tunefork.train.runner import MOST_GRADIENT_BYTES, MOST_TOKENS, ROOM


@dataclass(frozen=True, slots=True)
class Case:
    """One method, the model it trains, and where."""

    config: Any
    total_params: int
    made: Build
    target: Target
    is_varied: bool = True
    """Its passes are of many lengths, as those of real data are."""
    may_capture: bool = True
    """Whether its passes may be replayed as CUDA graphs; where memory is short, they are not."""

    def step(self, shape: Shape, *, evaluates: bool = False) -> Step:
        """Traced; with `evaluates` an evaluation's pass too."""
        return trace_step(self.config, self.made, shape, evaluates=evaluates)

    def memory(self, shape: Shape) -> Memory:
        """On each device."""
        return self.memory_of(self.step(shape), shape)

    def memory_of(self, step: Step, shape: Shape) -> Memory:
        """Of a pass of `shape`, whose step was traced, or made from one that was."""
        return self.as_run(step, shape)._memory(step, shape)

    def as_run(self, step: Step, shape: Shape) -> "Case":
        """`launched` where there is no room for graphs beside passes of `shape`: a run drops them.

        `step` is that of `shape`.
        """
        is_captured = self.captures(step, shape)
        if is_captured and self._memory(step, shape).process.high > self.target.memory_bytes:
            return self.launched
        return self

    def _memory(self, step: Step, shape: Shape) -> Memory:
        # A GPU gets its 4-bit layers one by one; on a CPU both forms lie in the same memory.
        is_in_place = self.target.kind == "cpu" and self.made.method is Method.QLORA
        return measure(
            step,
            self.target.fit.memory,
            self.target.trust,
            shards=self.target.count,
            is_recomputed=self.made.checkpointing != "none",
            is_captured=self.captures(step, shape),
            is_varied=self.is_varied,
            loaded_bytes=self.total_params * self.made.dtype.itemsize if is_in_place else 0,
        )

    @property
    def launched(self) -> "Case":
        """The same, captured nowhere: the least memory that it takes."""
        return replace(self, may_capture=False)

    def captures(self, step: Step, shape: Shape) -> bool:
        """Whether a pass of `shape` is replayed as one CUDA graph (`train/engine.py`, `runner.py`).

        `step` is of any shape of the case.
        """
        if not self.may_capture:
            return False
        made, static = self.made, sum(step.static.values())
        draws = made.method is not Method.FULL and made.lora.dropout > 0.0
        if not step.is_compiled or draws or made.releases or made.checkpointing == "offload":
            return False
        if shape.rows * shape.length > MOST_TOKENS or step.gradients > MOST_GRADIENT_BYTES:
            return False
        free = self.target.memory_bytes - self.target.fit.memory.context_bytes - static
        return free > ROOM * (step.peak.total - static)

    def time_error(self, step: Step, shape: Shape) -> float:
        """How far a step of such passes may be beyond what is predicted, relative.

        `step` is of any shape of the case.
        """
        fit = self.target.fit.time
        error = fit.error
        if not self.made.is_compiled:
            error = max(error, fit.error_launched)
        if self.made.checkpointing == "offload":
            error = max(error, fit.error_offloaded)
        if self.is_varied and self.captures(step, shape):
            error = max(error, fit.error_captured_varied)
        # A device that was not measured is as much less certain in a step of any kind.
        return (1 + error) / (1 + fit.error) * (1 + self.target.trust.time) - 1

    def fits(self, shape: Shape) -> bool:
        """Whether even the high end of the prediction does."""
        return self.memory(shape).process.high <= self.target.memory_bytes
