"""A planner of a few lines of arithmetic, so that the rules are tested and not the planner."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.advise.advice import Advice
from tunefork.advise.advise import advise
from tunefork.advise.amount import Amount
from tunefork.advise.resolve import Resolved, resolve
from tunefork.advise.situation import load_situation
from tunefork.plan.catalogue import Machine, load_catalogue
from tunefork.plan.schema import Interval, MachinePlan, MethodPlan, Plan, WorkPlan
from tunefork.recipe import FullSection, Method, ModelSection

FULL_BYTES = {("fp32", "adamw"): 16, ("bf16", "adamw"): 8, ("bf16", "adamw_8bit"): 6}
FLOPS = {"lora": 6, "qlora": 7, "full": 8}
ACTIVATIONS = 3e9
"""Of 4096 tokens in one pass."""


@dataclass(frozen=True)
class FakePlanner:
    """Weights, optimiser and a constant of activations; time at 40 % of the peak."""

    model: ModelSection | float
    sizes: tuple[tuple[str, float], ...] = ()

    @property
    def params(self) -> float:
        if isinstance(self.model, float):
            return self.model
        return dict(self.sizes)[self.model.id]

    def lora_params(self, rank: int) -> int:
        """41.9M at rank 16 for 8B, 207M for 70B: as Llama's."""
        return int(2.62e6 * (self.params / 8e9) ** 0.735 * rank)

    def plan(
        self,
        machine: Machine,
        amount: Amount,
        methods: Sequence[Method],
        *,
        rank: int,
        full: FullSection,
        has_details: bool = True,
    ) -> Plan:
        delta = self.lora_params(rank)
        peaks = {
            "lora": 2 * self.params + 16 * delta,
            "qlora": 0.55 * self.params + 16 * delta,
            "full": FULL_BYTES[(full.weights, full.optimizer)] * self.params,
        }
        planned = {
            name: self._method(name, peak / machine.count + ACTIVATIONS, delta, machine, amount)
            for name, peak in peaks.items()
            if name in methods
        }
        return Plan(
            model=f"{self.params:g}",
            total_params=int(self.params),
            machine=MachinePlan(
                gpu=machine.gpu.id,
                count=machine.count,
                memory_bytes=machine.gpu.usable_bytes,
                usd_per_hour=machine.gpu.usd_per_hour * machine.count,
                note="fake",
            ),
            work=WorkPlan(
                examples=amount.examples,
                tokens=amount.tokens,
                supervised_tokens=amount.supervised_tokens,
                epochs=amount.epochs,
                steps=amount.steps,
                batch_size=amount.batch_size,
                rows=1,
                length=amount.max_length,
                is_masked=True,
                note=amount.note,
            ),
            methods=planned,
        )

    def _method(
        self, name: str, peak: float, delta: int, machine: Machine, amount: Amount
    ) -> MethodPlan:
        memory = machine.gpu.usable_bytes
        low, high = 0.95 * peak, 1.05 * peak
        most = int((memory / 1.05 - peak + ACTIVATIONS) / ACTIVATIONS * 4096)
        work = FLOPS[name] * self.params * amount.tokens * amount.epochs
        total = work / (0.4 * machine.gpu.bf16_flops * machine.count)
        return MethodPlan(
            fits=high <= memory,
            may_fit=low <= memory,
            margin_bytes=int(memory - high),
            activation_checkpointing="full",
            total_params=int(self.params),
            trainable_params=int(self.params) if name == "full" else delta,
            peak_tensor_bytes=Interval(low=low, mid=peak, high=high),
            peak_process_bytes=Interval(low=low, mid=peak, high=high),
            phases={},
            step_s=total / amount.steps,
            step_s_interval=(0.9 * total / amount.steps, 1.1 * total / amount.steps),
            tokens_per_s=amount.tokens * amount.epochs / total,
            total_s=total,
            cost_usd=total / 3600 * machine.gpu.usd_per_hour * machine.count,
            artifact_bytes=int(2 * self.params) if name == "full" else 2 * delta,
            largest_micro_batch_tokens=most if most >= amount.max_length else None,
            largest_length=None,
            next_option=None if high <= memory else "a larger GPU",
        )


def resolved(runs: tuple[Path, ...] = (), file: Path | None = None, **given: Any) -> Resolved:
    """A situation with everything looked up."""
    situation = load_situation(file, given)
    return resolve(situation, load_catalogue(), runs, FakePlanner)


def advised(runs: tuple[Path, ...] = (), file: Path | None = None, **given: Any) -> Advice:
    """What is advised in a situation."""
    return advise(resolved(runs, file, **given))
