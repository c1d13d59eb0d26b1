"""What the advice says: the schema of `tunefork advise --json`.

Memory, time and cost are predicted, learning rate, rank and batch are where to start from.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tunefork.advise.rules import Answer
from tunefork.plan.schema import Plan

Confidence = Literal["high", "medium", "low"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Reason(_Part):
    """Why."""

    text: str
    """The reason, with the situation's figures."""
    source: str
    """A rule of thumb, a paper, a plan, or a run folder of your own."""
    rule: str
    """The row of the table in docs/advice.md."""


class Missing(_Part):
    """Something that was not said."""

    key: str
    """The situation's key."""
    effect: str
    """What the advice does without it."""


class Own(_Part):
    """A machine of one's own, at hand or rented, for the recommended method."""

    machine: str
    """`1 x l40s`"""
    gpus: list[str]
    """The same as a situation's `gpus`."""
    fits: bool
    """Whether the high end of the predicted memory fits."""
    is_at_hand: bool
    """Named in the situation, not looked for in the catalogue."""
    seconds: float
    """Of training, all tenants one after the other; predicted."""
    cost_usd: float
    """Of that time at the catalogue's price (approximate); nothing where the GPUs are yours."""
    note: str
    """Price and its source; what would make it fit where it does not."""


class Managed(_Part):
    """A managed service, for the same data."""

    id: str
    name: str
    cost_usd: float
    """Training tokens x epochs x price, all tenants; approximate."""
    is_usable: bool
    """Whether it could be used for this."""
    why_not: str | None
    """Why it could not; null where it could."""
    self_serve_until: str | None
    """No new jobs from this day on."""
    source: str
    date: str


class Where(_Part):
    """A machine of one's own beside managed services."""

    recommended: Literal["own", "managed", "none"]
    text: str
    """Why."""
    own: Own | None
    """Where to train: the GPUs at hand if it fits them, else the cheapest machine that fits."""
    at_hand: Own | None
    """On the GPUs at hand, whether or not it fits; null where none were named."""
    cheapest: Own | None
    """The catalogue's cheapest machine that fits; null where no more than eight GPUs do."""
    managed: list[Managed]
    """Those that could be used first, the cheapest of them first."""


class Advice(_Part):
    """The answer."""

    method: Answer
    """`none`: do not fine-tune, prompt or retrieve. `continued_pretraining` and `distillation` are
    forms of full fine-tuning."""
    text: str
    """The answer in a sentence."""
    rank: int | None
    """Null where nothing is low-rank."""
    alpha: float | None
    targets: str | None
    learning_rate: float | None
    """Peak, to start from."""
    batch_size: int | None
    """Examples a step, to start from."""
    epochs: float | None
    serving: str
    """How to serve the result."""
    confidence: Confidence
    """`high`: you measured it, or the other answers contradict what was said (memory, tenants,
    what is shipped). `medium`: rules of thumb agree, unmeasured on your data, or it goes beyond
    the budget or deadline. `low`: they disagree, what they rest on was not said, or it cannot be
    carried out (`confidence_text` has its cost or time)."""
    confidence_text: str
    """Why so."""
    reasons: list[Reason]
    against: list[Reason]
    """Rules that apply and speak for another answer, but weigh less."""
    would_change: list[str]
    """Borders at which the answer turns."""
    warnings: list[str]
    """What does not work out as asked: budget, deadline, memory."""
    missing: list[Missing]
    where: Where
    plan: Plan | None
    """LoRA, QLoRA and full on `where.own`'s machine, for one tenant; null for method none."""
    recipe: dict[str, Any] | None
    """Ready for `tunefork train` and `compare` once its paths are yours; null for method none."""
    recipe_yaml: str | None
    """The same as a file with comments."""
    measured: list[str]
    """Comparisons of your own that were found, and whether they count here."""
    assumptions: list[str]
    """How much data was assumed, and of what size of model."""
