"""What a run is: one YAML file, typed, frozen and documented field by field.

Every default lives here and nowhere else; the docstring under a field is its documentation (it
becomes the JSON schema and docs/recipe.md) and names the source of a default that has one.
Unknown keys are errors that name the nearest right one. Config stops at the builders: the modules
below them take plain ints, floats and tensors.

Sources named below:
- LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685
- QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314
- rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
- LoRA Without Regret: Schulman et al. 2025, https://thinkingmachines.ai/blog/lora/
"""

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)


class Method(StrEnum):
    """The three branches of the fork."""

    LORA = "lora"
    QLORA = "qlora"
    FULL = "full"


Format = Literal[
    "auto", "messages", "prompt_completion", "classification", "text", "alpaca", "sharegpt"
]
Metric = Literal["loss", "perplexity", "accuracy", "macro_f1", "exact_match", "rouge_l"]

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """Frozen, closed, and documented by the docstrings of its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read YAML's `yes` as 1."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError(
                f"must not be {value} (which is also what YAML reads yes, no, on, off as)"
            )
        return value


class ModelSection(Section):
    """The model that training starts from. A plain string is short for `id`."""

    id: Annotated[str, Field(min_length=1)]
    """A hub id, a local Hugging Face folder, a `.gguf` file, or a packaged model's short name
    (`smollm2-135m-instruct`)."""

    revision: str | None = None
    """Branch, tag or commit of a hub id. Refused for everything else."""


class DataSection(Section):
    """Where the examples come from and how a row becomes a supervised sequence."""

    train: Annotated[str, Field(min_length=1)]
    """A `.jsonl`, `.csv` or `.parquet` file, or a hub data set as `owner/name` or
    `owner/name:split` (split `train` by default). Paths are relative to the recipe's folder."""

    eval: str | None = None
    """Held-out examples, in the same forms. When absent, `eval_share` of the training examples
    is cut off, by a hash of each example, before anything is trained."""

    eval_share: Share = 0.1
    """Share of the training examples held out when `eval` is absent."""

    format: Format = "auto"
    """What a row holds. `auto` decides by the fields of all rows: `messages`,
    `conversations` (sharegpt), `instruction` + `output` (alpaca), `prompt` + `completion`,
    `text` + `label` (classification), `text`."""

    columns: dict[str, str] = {}
    """Renames: the field that `format` expects -> the column that the file has."""

    instruction: str | None = None
    """Classification only: the request put before every text. The default lists the labels."""

    labels: tuple[str, ...] | None = None
    """Classification only: the answers allowed, in order. Default: those of the training
    examples, sorted."""

    system: str | None = None
    """A system turn for rows that bring none. Default: what the chat template does by itself."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """`chat` renders turns by the tokenizer's chat template, `plain` joins prompt and answer
    without one; `auto` is `chat` where the tokenizer has a template."""

    supervise: Literal["all", "last"] = "all"
    """Which assistant turns are learnt. `last` suits templates that rewrite earlier turns."""

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest sequence, tokens."""

    too_long: Literal["error", "cut", "drop"] = "error"
    """For a row over `max_length`: refuse the data, cut its end, or leave it out; counted and
    reported. A row whose supervised tokens would all be cut away is left out. Plain `text` is
    always split into sequences of `max_length` instead, and nothing is lost."""

    bad_rows: Literal["error", "drop"] = "error"
    """For a row that cannot be used (not JSON, a field missing, an empty answer): refuse the
    data, or leave the row out; either way each is reported by file:line."""

    overlap: Literal["error", "drop"] = "error"
    """For an evaluation example that is also a training example: refuse the data, or leave it
    out of the training examples."""

    max_train_examples: PositiveInt | None = None
    """Train on a random subset of this many examples (by `train.seed`)."""

    max_eval_examples: PositiveInt | None = None
    """Evaluate on a random subset of this many examples (by `train.seed`)."""


class LoraSection(Section):
    """Low-rank deltas, y = W x + scale * B A x (LoRA, eq. 3). Used by `lora` and `qlora`."""

    rank: PositiveInt = 16
    """Rows of A, columns of B. Quality moves little from 4 to 512 for data that fits (LoRA
    Without Regret); measure on the evaluation set before paying for more."""

    alpha: PositiveFloat = 32.0
    """Numerator of the scale. 32 with 1/rank keeps the best learning rate nearly independent of
    rank (LoRA Without Regret)."""

    scaling: Literal["standard", "rslora"] = "standard"
    """`standard`: alpha / rank (LoRA). `rslora`: alpha / sqrt(rank) (rsLoRA)."""

    dropout: Share = 0.0
    """Dropout on the delta's input while training. 0: with one pass over the data it costs time
    and buys nothing measurable."""

    targets: Literal["all-linear", "attention", "mlp"] | tuple[str, ...] = "all-linear"
    """Which linear layers get a delta: all but the output head, one block's, or a list of module
    names (`q_proj`, or a longer path's end, `self_attn.q_proj`). Attention only loses to MLP
    only at equal parameters (LoRA Without Regret)."""

    serve_with: tuple[Literal["vllm", "sglang"], ...] = ()
    """Servers that the adapter is for: what one of them would refuse is refused before training.
    Empty: nothing is checked."""


class FullSection(Section):
    """Full fine-tuning."""

    weights: Literal["fp32", "bf16"] = "fp32"
    """What the optimiser updates. `fp32`: a master copy beside the compute weights, 12 bytes a
    parameter with AdamW's moments. `bf16`: no copy, updates by stochastic rounding, because a
    nearest-rounded bf16 weight loses every update below 1/256 of itself; refused where
    `train.precision` is fp32, or comes to that."""

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps both moments in 8 bits by blocks of 256 (bitsandbytes; Dettmers et al.
    2021, https://arxiv.org/abs/2110.02861)."""


class TrainSection(Section):
    """The optimisation, the same loop for every method."""

    epochs: PositiveFloat = 1.0
    """Passes over the training examples."""

    max_steps: PositiveInt | None = None
    """Stop after this many optimiser steps, if that comes first."""

    batch_size: PositiveInt = 16
    """Examples in one optimiser step. Small: LoRA falls behind full fine-tuning as batches
    grow, at any rank (LoRA Without Regret)."""

    micro_batch_tokens: PositiveInt = 4096
    """Most tokens, padding included, in one forward pass. A step with more is accumulated, which
    changes memory and speed but not the gradient. At least `data.max_length`."""

    packing: bool = True
    """Put several examples in one row where they fit. Neither attention nor positions leak
    between them, so this changes speed but not the gradient."""

    learning_rate: PositiveFloat | None = None
    """Peak learning rate. Default: 2e-4 for LoRA and QLoRA, 2e-5 for full: the best LoRA rate is
    about ten times full's (9.8 over 14 models, LoRA Without Regret). `compare` says that it
    leaves this out: one rate shared by LoRA and full would favour one of them, so each method's
    is searched among `compare.learning_rates`."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to zero after warm-up."""

    warmup_share: Share = 0.05
    """Share of the steps over which the learning rate rises linearly from zero."""

    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decoupled decay, on matrices only."""

    beta1: Share = 0.9
    """AdamW's decay of the first moment."""

    beta2: Share = 0.999
    """AdamW's decay of the second moment."""

    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global L2 norm."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Dtype of weights and activations in the forward pass. `auto`: bf16 on a GPU and on a CPU
    with bf16 instructions, else fp32."""

    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""

    seed: Seed = 0
    """Seeds what `train` draws: the order of the examples, adapter initialisation and dropout; and
    for every verb which examples `data.max_train_examples` and `max_eval_examples` keep. In
    `compare` also the validation split and the search; the final runs draw by `compare.seeds`.
    Two runs on one machine with the same versions are identical."""

    log_every_s: PositiveFloat = 5.0
    """Seconds between progress lines where the output is not a terminal."""


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


_LEARNING_RATES: dict[Method, tuple[float, ...]] = {
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

    learning_rates: dict[Method, tuple[PositiveFloat, ...]] = _LEARNING_RATES
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
        return _LEARNING_RATES | grids


class Recipe(Section):
    """One run, or one comparison: which model, which data, which method, how, and how judged."""

    model: ModelSection
    data: DataSection
    method: Method = Method.LORA
    """What `tunefork train` trains. `tunefork compare` trains `compare.methods`."""

    lora: LoraSection = LoraSection()
    full: FullSection = FullSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    compare: CompareSection = CompareSection()

    @model_validator(mode="before")
    @classmethod
    def _model_may_be_a_string(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("model"), str):
            return {**fields, "model": {"id": fields["model"]}}
        return fields

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.train.micro_batch_tokens < self.data.max_length:
            raise ValueError(
                f"train.micro_batch_tokens: {self.train.micro_batch_tokens} is less than "
                f"data.max_length ({self.data.max_length}): one sequence must fit in one pass"
            )
        lists: dict[str, tuple[object, ...] | str | None] = {
            "data.labels": self.data.labels,
            "lora.targets": self.lora.targets,
            "evaluate.metrics": self.evaluate.metrics,
            "compare.methods": self.compare.methods,
            "compare.seeds": self.compare.seeds,
        }
        for field, values in lists.items():
            if isinstance(values, tuple) and not values:
                raise ValueError(f"{field}: is an empty list; name at least one")
            if isinstance(values, tuple) and len(set(values)) < len(values):
                raise ValueError(f"{field}: holds the same value twice")
        for method in self.compare.methods:
            rates = self.compare.learning_rates.get(method, ())
            if len(rates) < self.compare.search_trials:
                raise ValueError(
                    f"compare.learning_rates.{method}: has {len(rates)} rates, but "
                    f"compare.search_trials asks for {self.compare.search_trials} for each method"
                )
            if list(rates) != sorted(set(rates)):
                raise ValueError(f"compare.learning_rates.{method}: must ascend, each rate once")
        return self

    def learning_rate(self, method: Method) -> float:
        """Peak learning rate for `method` where no search chose one."""
        if self.train.learning_rate is not None:
            return self.train.learning_rate
        return 2e-5 if method is Method.FULL else 2e-4
