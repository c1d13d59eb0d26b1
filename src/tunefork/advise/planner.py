"""The only door from the advice to the planner: what a method takes on a machine.

Rules and answers ask `Planner`, so that tests can put arithmetic in its place. Every figure that
comes through here is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from tunefork.advise.amount import Amount
from tunefork.plan.catalogue import Machine
from tunefork.plan.schema import Plan
from tunefork.recipe import FullSection, LoraSection, Method, ModelSection

PROBE = 16
"""Rank at which a delta's parameters are counted; they grow in proportion to the rank."""


class Planner(Protocol):
    """What the advice asks of the planner, about one model."""

    @property
    def params(self) -> float:
        """Parameters of the model."""

    def lora_params(self, rank: int) -> int:
        """Parameters of a delta of `rank` on all linear layers."""

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
        """`methods` on `machine`; details are limits and the next option."""


@dataclass(frozen=True)
class TracedPlanner:
    """The planner itself: a model's shape from its config, traced without weights."""

    model: ModelSection | float

    @cached_property
    def params(self) -> float:
        """Parameters of the model; raises ModelError where its config cannot be read."""
        if isinstance(self.model, float):
            return self.model
        from tunefork.plan.shape import config_for, count_params

        return float(count_params(config_for(self.model)))

    @cached_property
    def _probe(self) -> int:
        from tunefork.plan.shape import config_for, lora_params

        return lora_params(config_for(self.model), LoraSection(rank=PROBE))

    def lora_params(self, rank: int) -> int:
        """Parameters of a delta of `rank` on all linear layers."""
        return self._probe * rank // PROBE

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
        """`methods` on `machine`; details are limits and the next option."""
        from tunefork.plan.plan import Work, plan_numbers

        work = Work(
            examples=amount.examples,
            tokens=amount.tokens,
            supervised_tokens=amount.supervised_tokens,
            epochs=amount.epochs,
            max_length=amount.max_length,
            batch_size=amount.batch_size,
        )
        return plan_numbers(
            model=self.model,
            work=work,
            lora=LoraSection(rank=rank),
            full=full,
            methods=methods,
            machine=machine,
            checkpointing="full",
            has_details=has_details,
        )
