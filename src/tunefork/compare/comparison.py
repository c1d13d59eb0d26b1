"""What a comparison found: the schema of `comparison.json`, read and written.

Everything that the verdict, the table and the report say is computed from this file alone, so
that a report can be made again, later and elsewhere, and be checked. Figures are plain JSON
numbers in the units that each field names; what was not measured is null, never zero.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from tunefork.errors import TuneforkError
from tunefork.page.estimate import Count, Estimate, Part, Proportion, Quantity
from tunefork.recipe import Metric
from tunefork.registry.run import read_json, write_atomically
from tunefork.schema_markdown import schema_markdown

Trained = Literal["lora", "qlora", "full"]
Arm = Literal["base", "lora", "qlora", "full"]
"""What is compared: the untouched base and the three methods."""

ARMS: tuple[Arm, ...] = get_args(Arm)
TRAINED: tuple[Trained, ...] = get_args(Trained)
NAMES: dict[Arm, str] = {"base": "base", "lora": "LoRA", "qlora": "QLoRA", "full": "full"}
"""How an arm is called in a table's head."""
SUBJECTS: dict[Arm, str] = {
    "base": "the untouched base",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "full": "full fine-tuning",
}
"""How an arm is called in a sentence."""


class Forgetting(Part):
    """Loss on general text that is not the training domain, nats per token."""

    before: float
    """Of the untouched base."""
    after: float
    """Of the trained model; for the base the same as `before`."""
    change: Estimate | None
    """`after` - `before`; above 0 is forgetting. Null for the base."""


class SearchTrial(Part):
    """One short run of the learning-rate search."""

    learning_rate: Quantity
    """Peak learning rate tried."""
    examples: Count
    """Training examples that the trial saw."""
    validation_loss: float | None
    """Nats per supervised token on the validation split; null where it diverged."""
    rung: Count
    """Round of the successive halving, from 1; later rounds train longer."""
    status: Literal["ok", "diverged"]
    """`diverged`: its loss was no longer finite."""


class LossPoint(Part):
    """Training loss at one moment."""

    step: Count
    """Optimiser steps done."""
    tokens: Count
    """Training tokens seen, padding not counted."""
    loss: float
    """Nats per supervised token of the step."""
    learning_rate: Quantity
    """Learning rate of the step."""


class MethodResult(Part):
    """One method, or the untouched base. Nulls for what does not apply or did not finish."""

    status: Literal["ok", "failed", "interrupted"]
    """`ok`: trained and evaluated. `failed`: see `error`. `interrupted`: stopped by the user."""
    error: str | None = None
    """Why it failed, and what to do."""
    trainable_share: Proportion | None = None
    """Trained parameters as a share of all, 0 to 1. A delta's parameters count in both."""
    trainable_params: Count | None = None
    """Parameters that the optimiser updates."""
    total_params: Count | None = None
    """All parameters, deltas included; a tied one counts once."""
    peak_memory_bytes: Count | None = None
    """Most memory held while training, by `memory_kind`; the highest over the seeds."""
    memory_kind: Literal["cuda_allocated", "resident"] | None = None
    """`cuda_allocated`: tensors on the GPU (max_memory_allocated). `resident`: memory of the
    whole process (RSS) on a CPU, Python and libraries included."""
    predicted_memory_bytes: Quantity | None = None
    """What the plan said of `peak_memory_bytes` before the run (first seed)."""
    predicted_train_s: Quantity | None = None
    """What it said of `train_s`."""
    train_s: Quantity | None = None
    """Seconds of one training run, loading, search and evaluation left out; mean over
    seeds."""
    tokens_per_s: Quantity | None = None
    """`trained_tokens` / `train_s`."""
    trained_tokens: Count | None = None
    """Tokens seen in one training run, prompts included, padding not."""
    artifact_bytes: Count | None = None
    """Size on disk of what would be shipped: the adapter's folder, or the whole model's."""
    artifact: str | None = None
    """Where it lies, relative to the run folder (first seed)."""
    learning_rate: Quantity | None = None
    """Peak learning rate of the training runs, as the search chose it."""
    metrics: dict[Metric, Estimate] = Field(default_factory=dict)
    """On the evaluation examples; mean over seeds. `accuracy`, `macro_f1`, `exact_match` and
    `rouge_l` are shares from 0 to 1, `loss` is nats per supervised token."""
    forgetting: Forgetting | None = None
    """Null where the recipe left it out."""
    cost_usd: Quantity | None = None
    """US dollars for the search and one training run at `usd_per_hour`; null without a price."""
    search_s: Quantity | None = None
    """Seconds of the whole learning-rate search for this method."""
    search: tuple[SearchTrial, ...] = ()
    """Every trial of that search."""
    seeds: tuple[Count, ...] = ()
    """Seeds whose training runs finished and are in the figures."""
    loss_curve: tuple[LossPoint, ...] = ()
    """Training loss of the first seed, thinned."""


class PairedDifference(Part):
    """The figure of `a` minus that of `b`, compared example by example, with its 95 % interval."""

    a: Arm
    """The one."""
    b: Arm
    """The other."""
    metric: Metric
    """Which figure, in that metric's unit."""
    difference: float
    """`a` - `b`, over the same evaluation examples and, of two methods, over the same `seeds`."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    share_above: Proportion
    """Probability that `a` lies above `b`, by the distribution whose 95 % interval this is."""
    examples: Count | None = None
    """How many it was computed from: evaluation examples, generated answers (`exact_match`,
    `rouge_l`; see `evaluate.max_generated`), or documents of plain text. Below 10, no difference
    counts as detected. Null in files of before this was recorded."""
    seeds: tuple[Count, ...] = ()
    """Seeds that both finished, by which they are paired. Empty where they are not: with the base,
    or where two methods finished no seed in common."""


class Verdict(Part):
    """Which to choose, how sure that is, and what would change it."""

    method: Literal["lora", "qlora", "full", "no_detectable_difference"]
    """The method that does detectably better on the primary metric than the base and than every
    other method. `no_detectable_difference` where these results single out none: the best cannot
    be told from another method, no method can be told from the base, or none finished."""
    recommended: Arm | None
    """What to do: `method` where there is one and the difference matters (exceeds `margin`), else
    the cheapest of those that cannot be told apart or differ by less than `margin`. `base`: do
    not fine-tune on this evidence. Null with nothing to compare: no method finished, or one
    without the base."""
    confidence: Proportion | None
    """How sure it is that the method measured best is better than every other; from 0.95 on, one
    is singled out, which takes 10 evaluation examples. Where no method can be told from the base:
    how sure it is that the best beats the base. Adjusted for picking the best after looking. Null
    with nothing to compare."""
    text: str
    """The verdict in words."""
    would_change: tuple[str, ...]
    """What could overturn it, the most useful first."""


class Device(Part):
    """The machine and its versions."""

    name: str
    """GPU or CPU."""
    threads: Annotated[int, Field(ge=1)] | None
    """CPU threads that torch used; null on a GPU."""
    memory_bytes: Count
    """Memory of the GPU, or of the machine on a CPU."""
    torch: str
    """Version."""
    transformers: str
    """Version."""


class Model(Part):
    """The model that every method starts from."""

    id: str
    """As the recipe names it."""
    parameters: Count
    """Of the untouched base; a tied one counts once."""


class Data(Part):
    """The facts of the data that a reader needs to judge the figures."""

    train_examples: Count
    """Trained on; the search held its validation split out of these."""
    eval_examples: Count
    """Evaluated on, the same for every method; never used for a choice."""
    labels: Count | None
    """Different labels; null where the data has none."""
    majority_share: Proportion | None
    """Accuracy on the evaluation examples of always answering the most frequent label."""
    supervised_share: Proportion
    """Share of the training tokens that are targets."""
    tokens: Count
    """Tokens of the training examples, prompts included."""


class Comparison(Part):
    """The content of `comparison.json`."""

    tunefork_version: str
    """The version that made it."""
    created: str
    """When, ISO 8601 in UTC."""
    device: Device
    model: Model
    data: Data
    primary_metric: Metric
    """What the verdict is about."""
    margin: Quantity
    """A difference in `primary_metric` that would not matter, in its unit (`compare.margin`)."""
    usd_per_hour: Quantity | None
    """Price of the machine (`compare.usd_per_hour`), or null."""
    seeds: tuple[Count, ...]
    """Seeds asked for, one training run a method and seed."""
    methods: dict[Arm, MethodResult]
    """Keys `base`, `lora`, `qlora`, `full`; a method that was not asked for is absent."""
    paired: tuple[PairedDifference, ...]
    """Every pair of finished arms, for every metric."""
    verdict: Verdict
    recipe: dict[str, Any]
    """The resolved recipe."""

    @model_validator(mode="after")
    def _has_base(self) -> Self:
        if "base" not in self.methods:
            raise ValueError("methods: lacks `base`; it is always measured, or has failed")
        return self

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that were asked for, in the order of the columns."""
        return tuple(arm for arm in ARMS if arm in self.methods)

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all: a reader never sees half a file.

        Raises TuneforkError where it cannot be written (disk full, no permission).
        """
        try:
            write_atomically(path, self.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise TuneforkError(
                f"{path}: cannot be written ({error.strerror}); free some space (or make it "
                "writable) and run the same command again: what was trained is kept"
            ) from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `path`. Raises RunFolderError where it is missing or is not a comparison."""
        return read_json(
            cls,
            path,
            "is not a comparison of this version of tunefork; run tunefork compare again",
            "; give a folder made by tunefork compare",
        )


def comparison_markdown() -> str:
    """The text of docs/comparison.md: every key of `comparison.json` with its unit."""
    return schema_markdown(
        Comparison,
        "comparison.json",
        "What `tunefork compare RECIPE --out DIR` writes to `DIR/comparison.json`; the terminal's\n"
        "table and `DIR/report.html` are made from it alone. Sizes are bytes, times seconds,\n"
        "intervals 95 %. Read it in Python by `tunefork.compare.comparison.Comparison.load(path)`."
        "\n\n"
        "Generated from `src/tunefork/compare/comparison.py` by\n"
        "`python -m tunefork.documentation docs`.",
    )
