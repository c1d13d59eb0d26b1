"""`evaluate:` and `compare:`: what is measured, and the fair comparison."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from tunefork.recipe.section import Method, Metric, PositiveFloat, PositiveInt, Section, Seed


class EvaluateSection(Section):
    """What is measured on held-out examples."""

    metrics: tuple[Metric, ...] | None = None
    """Default: `loss` and `perplexity`, and for classification also `accuracy` and `macro_f1`.
    `exact_match` and `rouge_l` generate answers greedily, which takes longer."""

    label_normalization: Literal["tokens", "none"] = "none"
    """How labels of different lengths are ranked: by the log-likelihood of the whole answer,
    its end-of-turn token included (`none`), or by its mean over the answer's tokens (`tokens`)."""

    max_new_tokens: PositiveInt = 128
    """Longest generated answer, tokens."""

    max_generated: PositiveInt | None = 200
    """Generate for the first so many evaluation examples only; null for all."""

    forgetting: str | None = "general"
    """Text whose loss is measured before and after: `general` (a packaged mix of public-domain
    prose and reference text), a `.txt` or `.jsonl` file (field `text`), or null to leave it out."""

    bootstrap_samples: Annotated[int, Field(ge=200)] = 2000
    """Resamples behind every interval."""


DEFAULT_LEARNING_RATES: dict[Method, tuple[float, ...]] = {
    Method.LORA: (1e-4, 3e-4, 1e-3),
    Method.QLORA: (1e-4, 3e-4, 1e-3),
    Method.FULL: (1e-5, 3e-5, 1e-4),
}


class CompareSection(Section):
    """The fair comparison."""

    methods: tuple[Method, ...] = (Method.LORA, Method.QLORA, Method.FULL)
    """Which branches are tried, each in a process of its own. The untouched base is always
    measured too."""

    seeds: tuple[Seed, ...] = (0,)
    """Seeds of the final runs, one run a method and seed: the order of the examples (the same for
    every method), adapter initialisation and dropout. Which examples there are, the validation
    split and the search stay those of `train.seed`. With fewer than three the variance of training
    is unmeasured, and the verdict says so."""

    search_trials: PositiveInt = 3
    """Learning rates tried for each method, equally many for each. 1 takes `learning_rates`'
    middle one unsearched."""

    learning_rates: dict[Method, tuple[PositiveFloat, ...]] = DEFAULT_LEARNING_RATES
    """The grid for each method, ascending; LoRA's is ten times full's (LoRA Without Regret). A
    method left out keeps its default grid."""

    search_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """Share of the training examples that the longest search trial sees. Successive halving:
    every rate trains on half of it, the better half of the rates goes on to all of it."""

    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training examples cut off to choose the learning rate by. The evaluation
    examples are never used for a choice."""

    primary_metric: Metric | None = None
    """What the verdict is about. Default: `accuracy` for classification, else `loss`."""

    margin: Annotated[float, Field(ge=0.0)] = 0.01
    """A difference in the primary metric that would not matter to you, in its own unit."""

    usd_per_hour: Annotated[float, Field(ge=0.0)] | None = None
    """Price of this machine. Default: no cost is stated."""

    @field_validator("learning_rates")
    @classmethod
    def _fill_grids(cls, grids: dict[Method, tuple[float, ...]]) -> dict[Method, tuple[float, ...]]:
        return DEFAULT_LEARNING_RATES | grids
