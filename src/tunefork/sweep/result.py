"""What a sweep found: the schema of `sweep.json`, read and written.

The table, the page and the Markdown are made from this file alone. Figures are plain JSON numbers
in the units that each field names; what was not measured is null, never zero. Gains are above 0
where better, whichever way the metric goes.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from tunefork.page.estimate import Count, Estimate, Part, Proportion, Quantity
from tunefork.recipe import Metric
from tunefork.registry.run import read_json, write_atomically

RESULT = "sweep.json"

Status = Literal["ok", "dropped", "failed", "interrupted"]
"""`dropped`: stopped early as one of the worse; `failed`: it diverged or broke, and `error` says
how; `interrupted`: the sweep was stopped before it was done."""

Standing = Literal["shown", "not told apart", "worse", "better"]
"""Of one rank against another: shown to be equal within the margin, or the interval holds 0, or it
lies below or above."""


class Rung(Part):
    """A variant's place when some were dropped."""

    step: Count
    """Optimiser steps done."""
    validation_loss: float | None
    """Its configuration's, the mean over seeds, nats per supervised token."""
    place: Count
    """From 1, the best of those it was ranked against."""
    of: Count
    """How many these were."""
    is_kept: bool
    """Whether it went on."""
    behind: Estimate | None
    """Its loss minus the best one's, paired example by example; null for the best."""


class VariantResult(Part):
    """One run."""

    name: str
    folder: str
    """Its run folder, within the sweep's."""
    configuration: str
    """What it has in common with those that differ in the seed alone."""
    values: dict[str, Any]
    """Knob -> value, of those that the sweep turned."""
    rank: Count
    alpha: float
    learning_rate: Quantity
    """Peak."""
    seed: Count
    status: Status
    num_steps: Count
    """Optimiser steps done."""
    planned_steps: Count
    """Of the whole run."""
    tokens: Count
    """Trained on, prompts included, padding not."""
    trainable_params: Count
    train_s: Quantity
    """Its share, by tokens, of the time of the passes it took part in."""
    artifact_bytes: Count | None
    validation_loss: float | None
    """At its last validation, nats per supervised token."""
    metrics: dict[Metric, Estimate] = Field(default_factory=dict)
    """On the evaluation examples; empty unless `ok`."""
    forgetting: Estimate | None = None
    """Loss on general text, trained minus untouched base, nats per token; above 0 is forgetting."""
    rungs: tuple[Rung, ...] = ()
    error: str | None = None


class Configuration(Part):
    """Variants that differ in the seed alone, their mean."""

    name: str
    values: dict[str, Any]
    rank: Count
    learning_rate: Quantity
    seeds: tuple[int, ...]
    """Of the variants that came to their end."""
    status: Literal["ok", "dropped", "failed", "interrupted"]
    """`ok` where at least one variant came to its end."""
    validation_loss: float | None
    """Mean over seeds."""
    metrics: dict[Metric, Estimate] = Field(default_factory=dict)
    gain: Estimate | None = None
    """How much better on the primary metric than `chosen`, paired; null for that itself."""
    forgetting: Estimate | None = None
    trainable_params: Count
    train_s: Quantity
    """Of one variant, the mean."""
    is_pareto: bool = False
    """No other is at least as good in quality, forgetting, parameters and time, and better in
    one."""


class RankResult(Part):
    """The best configuration of one rank."""

    rank: Count
    configuration: str
    """The one with the lowest validation loss."""
    learning_rate: Quantity
    value: Estimate
    """Its primary metric on the evaluation examples."""
    gain: Estimate | None
    """How much better than the rank of `chosen`, paired; null for that rank itself."""
    is_equal: Standing | None
    """`shown`: the whole interval of the gain is within the margin; `not told apart`: it holds 0;
    `worse`, `better`: it does not. Null for the rank of `chosen`."""
    trainable_params: Count


class RankEffect(Part):
    """How much rank mattered at all."""

    ranks: tuple[RankResult, ...]
    """Ascending."""
    best: Count
    """The rank with the lowest validation loss at its best setting."""
    worst: Count
    """That with the highest."""
    spread: Estimate
    """Primary metric of the best minus that of the worst rank, each at its own best setting, as a
    gain. Both are chosen by validation loss, so that the evaluation examples are free to judge."""
    is_detected: bool
    """Whether the interval excludes 0, on enough examples."""
    is_within_margin: bool
    """Whether the whole interval is within the margin."""


class RateOfRank(Part):
    """The learning rates of one rank."""

    rank: Count
    losses: dict[str, float]
    """Learning rate -> the lowest validation loss with it, of runs that came to their end."""
    best: Quantity
    is_at_edge: bool
    """The best is the lowest or highest tried, so that a better one may lie outside."""
    cost_of_common: Estimate | None
    """Evaluation loss with `common` minus that with `best`, paired; null where they are one, or
    where `common` was not trained to its end with this rank."""


class RateEffect(Part):
    """Whether the best learning rate moves with rank."""

    ranks: tuple[RateOfRank, ...]
    common: Quantity
    """The one rate with the lowest validation loss, mean over the ranks that have it."""
    moves: bool
    """Whether the best rates of the ranks differ."""
    is_detected: bool
    """Whether for some rank the common rate is worse than its own beyond chance, with as many
    chances to be wrong as ranks (Bonferroni)."""


class KnobEffect(Part):
    """How far a knob explains the primary metric, over all variants that came to their end."""

    knob: str
    share: Proportion
    """Of the variance between variants, the part between the means of the knob's values."""
    spread: Quantity
    """Highest minus lowest of these means, in the metric's unit."""


class Recommendation(Part):
    """What to take."""

    configuration: str
    rank: Count
    reason: str


class SweepResult(Part):
    """`sweep.json`."""

    schema_version: Literal[1] = 1
    tunefork_version: str
    created: str
    """ISO 8601, UTC."""
    model_id: str
    method: Literal["lora", "qlora"]
    recipe: dict[str, Any]
    """The sweep's, resolved; paths below the working directory are relative to it."""
    primary_metric: Metric
    margin: Quantity
    train_examples: Count
    validation_examples: Count
    """Held back from training to choose by."""
    eval_examples: Count
    """Used for no choice."""
    base_metrics: dict[Metric, Estimate] = Field(default_factory=dict)
    """Of the untouched base."""
    majority_share: float | None
    """Accuracy of always giving the training data's most frequent label."""
    variants: tuple[VariantResult, ...]
    """In the order of the grid."""
    configurations: tuple[Configuration, ...]
    """Ranked: by the primary metric, then those dropped, latest first, then those that failed."""
    chosen: str | None
    """The configuration with the lowest validation loss of those that came to their end: what the
    others are compared with, because no evaluation example played a part in choosing it."""
    recommended: Recommendation | None
    rank_effect: RankEffect | None
    """Null where fewer than two ranks came to an end."""
    rate_effect: RateEffect | None
    """Null where fewer than two ranks or two learning rates came to an end."""
    knobs: tuple[KnobEffect, ...] = ()
    """Largest first; empty where some were dropped or failed, which unbalances the grid."""
    together: Count
    """Most variants that trained at one time."""
    wall_s: Quantity
    """Training of all variants, validation included; neither loading nor evaluation."""
    tokens_per_s: float | None
    """Of all variants, over `wall_s`."""
    peak_memory_bytes: Count | None
    device: dict[str, str | int]
    versions: dict[str, str]

    def save(self, path: Path) -> None:
        """Write `path` in one rename."""
        write_atomically(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `path`. Raises RunFolderError where it is missing or is not a sweep's."""
        return read_json(
            cls,
            path,
            "is not a sweep of this version of tunefork; run tunefork sweep again",
            "; give a folder made by tunefork sweep",
        )
