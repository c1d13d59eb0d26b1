"""What each method takes on the GPUs at hand and on the catalogue's, each planned once, when asked.

Every figure is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tunefork.advise.amount import Amount
from tunefork.advise.planner import Planner
from tunefork.plan.catalogue import Catalogue, Machine
from tunefork.plan.schema import MethodPlan, Plan
from tunefork.recipe import FullSection, Method

COUNTS = (1, 2, 4, 8)
"""GPUs of one kind in a machine that is looked for."""
FULL_FORMS = (
    FullSection(),
    FullSection(weights="bf16"),
    FullSection(weights="bf16", optimizer="adamw_8bit"),
)
"""Ways to fine-tune fully, from the most exact to the smallest."""
SMALL_MODEL = 2e9
"""Up to so many parameters full fine-tuning keeps fp32 weights unless memory forbids it."""
LEAST_BYTES = {"fp32": 12, "bf16": 4}
"""Of a parameter that is trained, at the very least: where these do not fit, nothing is planned."""
PATIENCE_S = 14 * 86_400.0
"""Without a deadline, machines that would take longer than two weeks are passed over if others do
not."""
ROOM = 1.2
"""Times the mean length that rows must hold at least to be called long enough."""
LENGTH_STEP = 64
"""Lengths proposed are multiples of this many tokens."""


def size_text(params: float) -> str:
    """`8B`, `0.135B`"""
    return f"{params / 1e9:.3g}B"


@dataclass(frozen=True, slots=True)
class Placed:
    """One method on one machine, for one adapter or model."""

    machine: Machine
    method: Method
    figures: MethodPlan
    amount: Amount

    @property
    def fits(self) -> bool:
        """Whether it fits as planned, or in smaller micro-batches, or with shorter rows that still
        leave room for examples of the mean length."""
        return self.figures.fits or self.smaller_tokens is not None

    @property
    def smaller_tokens(self) -> int | None:
        """`train.micro_batch_tokens` by which it fits, where it does not as planned."""
        return None if self.figures.fits else self._most_tokens

    @property
    def shorter(self) -> int | None:
        """`data.max_length` by which it fits, where not even one row as long as planned does."""
        figures, longest = self.figures, self.figures.largest_length or 0
        if figures.fits or figures.largest_micro_batch_tokens is not None:
            return None
        mean = self.amount.tokens / self.amount.examples
        if longest < ROOM * mean and longest < self.amount.max_length:
            return None
        return min(self.amount.max_length, longest // LENGTH_STEP * LENGTH_STEP)

    @property
    def _most_tokens(self) -> int | None:
        most = self.figures.largest_micro_batch_tokens
        return self.shorter if most is None else most

    @property
    def cost_usd(self) -> float:
        """At the catalogue's price."""
        hours = self.figures.total_s / 3600
        return hours * self.machine.gpu.usd_per_hour * self.machine.count


@dataclass(frozen=True)
class Estimates:
    """Plans for the machine at hand and for the catalogue's, each made once, when asked for."""

    planner: Planner
    catalogue: Catalogue
    amount: Amount
    rank: int
    at_hand: Machine | None
    deadline_s: float | None
    may_leave: bool
    """Whether a machine may be rented: the data may leave."""
    _made: dict[tuple[Machine, Method, FullSection], MethodPlan] = field(default_factory=dict)

    @cached_property
    def full(self) -> FullSection:
        """The most exact form of full fine-tuning that fits at hand, else one of usual size."""
        usual = FULL_FORMS[0 if self.planner.params < SMALL_MODEL else 1]
        machine = self.at_hand
        if machine is None:
            return usual
        least = self.planner.params / machine.count
        hopeful = (
            form
            for form in FULL_FORMS[FULL_FORMS.index(usual) :]
            if least * LEAST_BYTES[form.weights] < machine.gpu.memory_bytes
        )
        fitting = (form for form in hopeful if self._form(machine, Method.FULL, form).fits)
        return next(fitting, usual)

    def here(self, method: Method) -> Placed | None:
        """`method` on the GPUs at hand, whether or not it fits; None where none were named."""
        return None if self.at_hand is None else self.on(self.at_hand, method)

    def cheapest(self, method: Method) -> Placed | None:
        """The catalogue's cheapest machine on which `method` fits and meets the deadline.

        Where no machine meets it, the fastest that fits; None where none of at most
        eight GPUs does. More GPUs are tried only where fewer do not do.
        """
        fitting: list[Placed] = []
        for count in COUNTS:
            placed = [self.on(Machine(gpu, count), method) for gpu in self.catalogue.gpus]
            fitting += [p for p in placed if p.fits]
            in_time = [p for p in fitting if self.is_in_time(p)]
            if in_time:
                return min(in_time, key=lambda p: p.cost_usd)
        return min(fitting, key=lambda p: p.figures.total_s, default=None)

    def best(self, method: Method) -> Placed | None:
        """`method` at hand where it fits there in time, else on the cheapest machine."""
        here = self.here(method)
        if here is None or not here.fits:
            return self.cheapest(method)
        if self.deadline_s is None or self.is_in_time(here) or not self.may_leave:
            return here
        cheapest = self.cheapest(method)
        return cheapest if cheapest is not None and self.is_in_time(cheapest) else here

    def is_in_time(self, placed: Placed) -> bool:
        """Whether it ends before the deadline, or within two weeks where none was given."""
        limit = PATIENCE_S if self.deadline_s is None else self.deadline_s
        return placed.figures.total_s <= limit

    def on(self, machine: Machine, method: Method) -> Placed:
        """`method` on `machine`."""
        return self._form(machine, method, self.full)

    def side_by_side(self, machine: Machine) -> Plan:
        """All methods on `machine`."""
        return self.planner.plan(
            machine, self.amount, tuple(Method), rank=self.rank, full=self.full
        )

    def _form(self, machine: Machine, method: Method, full: FullSection) -> Placed:
        key = (machine, method, full)
        if key not in self._made:
            plan = self.planner.plan(
                machine,
                self.amount,
                (method,),
                rank=self.rank,
                full=full,
                has_details=machine == self.at_hand,
            )
            self._made[key] = plan.methods[method.value]
        return Placed(machine, method, self._made[key], self.amount)


def gpu_ids(machine: Machine) -> Sequence[str]:
    """The machine as a situation's `gpus`: an id n times."""
    return [machine.gpu.id] * machine.count


def machine_text(machine: Machine) -> str:
    """`1 x l40s`"""
    return f"{machine.count} x {machine.gpu.id}"
