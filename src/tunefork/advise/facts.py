"""What the rules ask: the situation and everything that follows from it by arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tunefork.advise.amount import FEW_STEPS, Amount
from tunefork.advise.estimate import Estimates, Placed
from tunefork.advise.experience import Experience, deciding
from tunefork.advise.situation import Situation
from tunefork.compare.comparison import Arm
from tunefork.recipe import Method

FULL_RATE = 2e-5
FULL_RATE_LARGE = 1e-5
"""Peak learning rate of full fine-tuning, and that from 30B parameters on: a tenth of QLoRA's 2e-4
for 7B and 13B, 1e-4 for 33B and 65B (Dettmers et al. 2023, table 9)."""
LARGE_MODEL = 30e9
RATIO, RATIO_SHORT = 10, 15
"""LoRA's best learning rate over full's (9.8 over 14 models), and under 100 steps (LoRA Without
Regret)."""
FEWEST_EXAMPLES = 50
"""Below this, gains are seldom visible (OpenAI's fine-tuning guide: 50 to 100 show an effect)."""
FEW_EXAMPLES = 200
MUCH_TEXT = 100_000_000
"""Tokens of plain text from which one speaks of continued pre-training; a round number of ours."""
GAP_POINTS = 1.0
"""What LoRA may lose to full fine-tuning, percentage points: the low end of mission.md's rule 5."""
FULL_RUNS = 5
"""Runs of full fine-tuning until it is right: a search of three rates, and two seeds more."""
FULL_LEAST_USD = 5_000.0
"""What one serious full experiment is said to cost at least (mission.md's rule 7)."""


@dataclass(frozen=True)
class Facts:
    """One situation, resolved."""

    situation: Situation
    params: float
    """Of the model; assumed where `is_size_known` is false."""
    is_size_known: bool
    amount: Amount
    rank_needed: int | None
    """The lowest rank that holds the data; None where none does."""
    rank: int
    """The rank to start from."""
    estimates: Estimates
    experiences: Sequence[Experience]

    @property
    def tenants(self) -> int:
        """Adapters or models needed."""
        return self.situation.tenants or 1

    def fits_here(self, method: Method) -> bool:
        """Whether `method` fits the GPUs at hand; true where none were named."""
        here = self.estimates.here(method)
        return here is None or here.fits

    def may_fit_here(self, method: Method) -> bool:
        """Whether `method` may fit the GPUs at hand, at the low end of the prediction."""
        here = self.estimates.here(method)
        return here is None or here.figures.may_fit

    def best(self, method: Method) -> Placed | None:
        """Where `method` would be trained."""
        return self.estimates.best(method)

    def cost_usd(self, method: Method) -> float:
        """Of `method` for all tenants where it would be trained; infinite where it fits nowhere."""
        placed = self.best(method)
        return float("inf") if placed is None else placed.cost_usd * self.tenants

    def seconds(self, method: Method) -> float:
        """Of `method` for all tenants, one after the other."""
        placed = self.best(method)
        return float("inf") if placed is None else placed.figures.total_s * self.tenants

    def is_over_budget(self, method: Method) -> bool:
        """Whether `method` costs more than may be spent."""
        budget = self.situation.budget_usd
        return budget is not None and self.is_paid(method) and self.cost_usd(method) > budget

    def is_paid(self, method: Method) -> bool:
        """Whether the GPUs must be rented: those at hand take nothing from the budget."""
        placed = self.best(method)
        return placed is None or placed.machine != self.estimates.at_hand

    def is_too_slow(self, method: Method) -> bool:
        """Whether `method` takes longer than there is time."""
        deadline = self.situation.deadline_hours
        return deadline is not None and self.seconds(method) > deadline * 3600

    def learning_rate(self, method: Method) -> float:
        """To start from: full's times 10 for a delta, times 15 in a run of few steps."""
        full = FULL_RATE if self.params < LARGE_MODEL else FULL_RATE_LARGE
        if method is Method.FULL:
            return full
        return full * (RATIO_SHORT if self.amount.steps < FEW_STEPS else RATIO)

    # What quality is worth

    @property
    def worth_usd(self) -> float:
        """What the last points of quality may be worth."""
        return (self.situation.quality_point_value_usd or 0.0) * GAP_POINTS

    @cached_property
    def full_extra_usd(self) -> float:
        """What full fine-tuning costs beyond LoRA until it is right, at least 5,000 US dollars."""
        extra = self.cost_usd(Method.FULL) - self.cost_usd(Method.LORA)
        return max(FULL_LEAST_USD, FULL_RUNS * extra) if extra < float("inf") else FULL_LEAST_USD

    # What was measured

    @cached_property
    def experience(self) -> Experience | None:
        """The comparison of the user's own that counts most."""
        return deciding(self.experiences)

    @property
    def measured_best(self) -> Arm | None:
        """What that comparison recommends."""
        found = self.experience
        return None if found is None else found.comparison.verdict.recommended
