"""What a run is: one YAML file, typed, frozen and documented field by field.

Every default lives here and nowhere else; the docstring under a field is its documentation (it
becomes the JSON schema and docs/recipe.md) and names the source of a default that has one.
Unknown keys are errors that name the nearest right one. Config stops at the builders: the modules
below them take plain ints, floats and tensors.

Sources named below:
- LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685
- QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314
- rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
- DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353
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
Scaling = Literal["standard", "rslora"]
Targets = Literal["all-linear", "attention", "mlp"] | tuple[str, ...]
Schedule = Literal["cosine", "linear", "constant"]

Checkpointing = Literal["none", "selective", "full", "offload"]
"""How activations are kept for the backward pass (`train.activation_checkpointing`)."""
CheckpointingChoice = Literal["auto", "none", "selective", "full", "offload"]
"""The same, or left to the plan."""
Compile = Literal["auto", "always", "never"]
"""Whether layers are compiled (`train.compile`)."""

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

    add_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tokens added to the tokenizer. Their rows of the embedding (and of the output head) start as
    the mean of the others and are trained by every method: by LoRA and QLoRA alone, as PEFT's
    `trainable_token_indices`, unless `lora.modules_to_save` trains all rows."""


Action = Literal["error", "warn", "drop", "ignore"]
"""Refuse the data, say it and go on, leave the row out, or do not look."""
Verdict = Literal["error", "warn", "ignore"]
"""For what no single row is to blame: there is nothing to drop."""


class FaultSection(Section):
    """What to do about each fault that `tunefork data check` looks for: `error` refuses the data,
    `warn` says it and goes on, `drop` leaves those rows out and says so, `ignore` does not look.
    Every default is `warn`, because each of these can be meant. (See also `data.bad_rows`,
    `data.too_long` and `data.overlap`.)"""

    duplicates: Action = "warn"
    """An example that says what an earlier one of its split says, white space aside. `drop` keeps
    the first."""

    contradictions: Verdict = "warn"
    """Classification: a text that is trained on with two labels."""

    near_duplicates: Action = "warn"
    """A training example that is nearly an earlier one (`near_similarity`). `drop` keeps the
    first."""

    near_overlap: Action = "warn"
    """An evaluation example that is nearly a training example. `drop` leaves the training example
    out."""

    near_similarity: Annotated[float, Field(ge=0.5, le=1.0)] = 0.8
    """Nearly: the share that two texts have in common of all their runs of three words (Jaccard
    similarity), upper case, punctuation and wording that many rows share aside. 0.8 is what large
    corpora are deduplicated at (Lee et al. 2022, https://arxiv.org/abs/2107.06499). One other word
    makes a different text up to 28 words, or 10 where it is the first or last."""

    roles: Action = "warn"
    """A conversation with two turns of one role in a row, a system turn that is not the first, or
    a tool's turn that follows no answer. (What cannot be rendered at all is a bad row.)"""

    unicode: Action = "warn"
    """Text that was broken on its way: U+FFFD, UTF-8 read as another encoding, NUL and control
    characters, byte-order marks."""

    secrets: Action = "warn"
    """Private keys, access tokens, passwords in URLs, random values of keys and passwords. What a
    model is trained on it can repeat."""

    emails: Action = "warn"
    """E-mail addresses, those reserved for examples aside (RFC 2606)."""

    unseen_labels: Verdict = "warn"
    """Classification: evaluation examples with a label of `data.labels` that is never trained
    on."""

    similar_labels: Verdict = "warn"
    """Classification: labels that differ only in case, white space or Unicode normalisation."""

    imbalance: Verdict = "warn"
    """Classification: the most frequent label has over `imbalance_ratio` times the training
    examples of the rarest."""

    imbalance_ratio: Annotated[float, Field(ge=1.0)] = 20.0
    """See `imbalance`. A convention, not a law: small classes may need examples, not a warning."""

    few_eval: Verdict = "warn"
    """Classification: a trained label has fewer than `min_eval_per_label` evaluation examples."""

    min_eval_per_label: PositiveInt = 3
    """See `few_eval`. With fewer, one answer moves a label's accuracy by half or more; to compare
    labels give tens of each."""

    @model_validator(mode="after")
    def _numbers_apply(self) -> Self:
        fields = type(self).model_fields
        for number, faults in (
            ("near_similarity", ("near_duplicates", "near_overlap")),
            ("imbalance_ratio", ("imbalance",)),
            ("min_eval_per_label", ("few_eval",)),
        ):
            is_set = getattr(self, number) != fields[number].default
            if is_set and all(getattr(self, fault) == "ignore" for fault in faults):
                raise ValueError(f"{number}: has no use where {' and '.join(faults)}: ignore")
        return self


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

    faults: FaultSection = FaultSection()

    max_train_examples: PositiveInt | None = None
    """Train on a random subset of this many examples (by `data.seed`)."""

    max_eval_examples: PositiveInt | None = None
    """Evaluate on a random subset of this many examples (by `data.seed`)."""

    seed: Seed | None = None
    """Seeds the choice of examples: the two subsets above and `train.validation_share`. Default:
    `train.seed`. Runs with one `data.seed` and several `train.seed`s differ in training alone,
    which is how `tunefork sweep` varies the seed."""


class LoraSection(Section):
    """Low-rank deltas, y = W x + scale * B A x (LoRA, eq. 3). Used by `lora` and `qlora`."""

    rank: PositiveInt = 16
    """Rows of A, columns of B. Quality moves little from 4 to 512 for data that fits (LoRA
    Without Regret); measure on the evaluation set before paying for more."""

    alpha: PositiveFloat = 32.0
    """Numerator of the scale. 32 with 1/rank keeps the best learning rate nearly independent of
    rank (LoRA Without Regret)."""

    scaling: Scaling = "standard"
    """`standard`: alpha / rank (LoRA). `rslora`: alpha / sqrt(rank) (rsLoRA)."""

    dropout: Share = 0.0
    """Dropout on the delta's input while training. 0: with one pass over the data it costs time
    and buys nothing measurable."""

    targets: Targets = "all-linear"
    """Which linear layers get a delta: all but the output head, one block's, or a list of module
    names (`q_proj`, or a longer path's end, `self_attn.q_proj`). Attention only loses to MLP
    only at equal parameters (LoRA Without Regret)."""

    dora: bool = False
    """Also train the length of each row of W + scale * B A (DoRA, eq. 5). One number an output
    feature more, a slower step, and some servers refuse such adapters. Refused for `full`."""

    modules_to_save: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Modules trained whole beside the deltas and saved with them: `embed_tokens`, `lm_head`,
    `norm`, or a longer path's end. A tied head or embedding named here is untied. The adapter grows
    by their size. Refused for `full`, which trains everything."""

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

    optimizer: Literal["adamw", "adamw_bf16", "adamw_8bit"] = "adamw"
    """What AdamW keeps its two moments in. `adamw`: fp32, 8 bytes a parameter. `adamw_bf16`: bf16,
    4 bytes a parameter, rounded stochastically like the weights, which must be `weights: bf16`; one
    pass over weight, gradient and moments, and no fp32 copies. `adamw_8bit`: 8 bits by blocks of
    256, 2 bytes a parameter (bitsandbytes; Dettmers et al. 2021, https://arxiv.org/abs/2110.02861).
    The default is the one that rounds nothing."""

    @model_validator(mode="after")
    def _check_moments(self) -> Self:
        if self.optimizer == "adamw_bf16" and self.weights != "bf16":
            raise ValueError(
                "optimizer: adamw_bf16 updates bf16 weights in place; set full.weights: bf16 too, "
                "or full.optimizer: adamw or adamw_8bit"
            )
        return self


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
    """Peak learning rate. Default: the middle of the method's `compare.learning_rates` where the
    recipe gives those, else 2e-4 for LoRA and QLoRA, 2e-5 for full: the best LoRA rate is about ten
    times full's (9.8 over 14 models, LoRA Without Regret). `compare` refuses it: one rate shared by
    LoRA and full would favour one of them, so each method's is searched among
    `compare.learning_rates`."""

    schedule: Schedule = "cosine"
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

    precision: Literal["auto", "bf16", "fp8", "fp32"] = "auto"
    """Dtype of weights and activations in the forward pass. `fp8`: products with a frozen base in
    e4m3, for methods that have one (lora, qlora; `full` then computes in bf16), with everything
    else in bf16. Made for Hopper GPUs and later; a CPU computes it slowly. `auto`: fp8 on such a
    GPU where its gate was passed for the model's family, method and size (train/fp8_gate.yaml; so
    far for lora of llamas of 0.1 to 0.3B), the run has at least 100 steps, and two batches of its
    own agree in both (run.json has the figures); else bf16 on a GPU and on a CPU with bf16
    instructions; else fp32. `train` and the final runs of `compare` choose so; searches, sweeps and
    groups take bf16."""

    activation_checkpointing: CheckpointingChoice = "auto"
    """What is kept for the backward pass. `none`: every activation. `full` (or true): each layer's
    input, and the layer runs again. `offload`: those inputs too wait in host memory, copied beside
    the computation. `selective`: the results of large products; the rest is made again (needs
    `compile`; without it, as `full`). The gradients are the same. `auto`: the plan picks, for each
    method, the fastest (none, selective, full, offload, in this order) that fits in the free memory
    of the GPU at the high end of the plan's interval; on a CPU `none`, or `full` where that does
    not fit in its memory; `full` on a GPU for a model that cannot be planned. run.json says what it
    was, and a stopped run goes on with the same."""

    compile: Compile = "auto"
    """Compile the layers (torch.compile) and, where launching a pass's kernels takes longer than
    running them, replay it as one CUDA graph. Costs 15 to 40 s at the start of a first run; the
    compiled code is kept for later ones. `auto`: on a GPU, for runs of at least 100 optimiser
    steps. A CPU run is never compiled."""

    seed: Seed = 0
    """Seeds what `train` draws: the order of the examples, adapter initialisation and dropout; and
    for every verb which examples are chosen, unless `data.seed` is given. In
    `compare` also the validation split and the search; the final runs draw by `compare.seeds`.
    Two runs on one machine with the same versions are identical, on a GPU with `deterministic`."""

    deterministic: bool = False
    """On a GPU: only kernels that give the same bits each time (ordered sums in attention's
    backward pass, a fixed cuBLAS workspace, no choice of kernels by measurement); an operation that
    has none ends the run. Off, as it costs speed there: on an H200 with a 1B model and 4,096 tokens
    a step 42 % (LoRA), 57 % (QLoRA), 8 % (full; benchmarks/results/h200_deterministic.json). A CPU
    gives the same bits either way, for one number of threads."""

    checkpoint_every_s: PositiveFloat | None = 300.0
    """Seconds between checkpoints, from which the same command goes on, bit for bit, after a stop,
    a kill or a power cut: at most so much is lost. null: none by time. Of five minutes, saving
    SmolLM2-135M takes 0.05 % (LoRA, QLoRA) and 1 to 2 % (full) on a CPU (benchmarks/faults.py). A
    run that is told to stop (Ctrl-C, SIGTERM, SIGUSR1, `preemption_file`) saves one whatever this
    says."""

    checkpoint_every_steps: PositiveInt | None = None
    """A checkpoint also after every so many optimiser steps."""

    keep_checkpoints: PositiveInt = 2
    """The newest so many checkpoints are kept: one more than is needed, should its disk fail."""

    validate_every_steps: PositiveInt | None = None
    """Measure the loss on held-back examples after every so many optimiser steps, and after the
    last. They are cut off the training examples (`validation_share`); the evaluation's are used for
    no choice. null: no validation, and all training examples are trained on."""

    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the training examples that `validate_every_steps` holds back, by a hash of each."""

    keep: Literal["last", "best"] = "last"
    """Which state a finished run leaves: after its last step, or after the step with the lowest
    validation loss, which then is among the checkpoints. `best` needs `validate_every_steps`."""

    checkpoints_when_done: Literal["remove", "keep"] = "remove"
    """What becomes of the checkpoints once what was trained is saved."""

    preemption_file: str | None = None
    """A file whose appearance tells that the machine will be taken away: the run saves its state
    after the step at hand and ends, as on SIGTERM. Relative to where the command runs."""

    log_every_s: PositiveFloat = 5.0
    """Seconds between progress lines where the output is not a terminal."""

    rehearse: bool = True
    """Before the first step, go once through the longest micro-batch of the whole run, the largest
    batch of the evaluation and one save, so that a lack of memory or disk shows in the first
    minute. Costs two micro-batches, one update, one evaluation batch and one save, and changes no
    bit of the run. Runs of fewer than 64 micro-batches are not rehearsed: it would
    be more than a sixteenth of them. Adapters that train
    together (`sweep`, `train-many`) are not rehearsed: how many there are is the plan's choice."""

    on_out_of_memory: Literal["error", "shrink"] = "error"
    """What a forward or backward pass without memory leads to. `error`: the run stops and names the
    cheapest change. `shrink`: the step is taken again in micro-batches of half the tokens, down to
    one row at a time, and so are those after it; the gradient is the same but for rounding."""

    on_loss_spike: Literal["warn", "rollback", "stop"] = "warn"
    """What a loss far above the last 64 leads to (10 robust standard deviations). `rollback`: back
    to the last checkpoint, and on without the rows of the steps around the spike. `stop`: the run
    fails before the update. A loss that is not finite always stops it."""

    trackers: tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...] = ()
    """Where the figures of each step go beside events.jsonl. Each is an extra (`pip install
    'tunefork[mlflow]'`) and finds its server in its own environment variables."""

    @property
    def checkpointing(self) -> Checkpointing:
        """`activation_checkpointing`; an `auto` that no plan has settled keeps everything."""
        chosen = self.activation_checkpointing
        return "none" if chosen == "auto" else chosen

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _from_bool(cls, value: object) -> object:
        """It was true or false before there was a choice."""
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


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


class HalvingSection(Section):
    """Successive halving: the hopeless stop early, and those waiting take their place (Jamieson and
    Talwalkar 2016, https://arxiv.org/abs/1502.07943). Every variant trains to the first rung, the
    better `keep` of them to the second, and so on; what is left trains to its end. Rungs are
    places in each variant's own schedule: rates are judged before theirs has fallen, which favours
    low ones a little."""

    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share that goes on from each rung, rounded up."""

    rungs: Annotated[int, Field(ge=1, le=8)] = 2
    """How often variants are dropped. The last rung lies at `keep` of each variant's steps, the one
    before at `keep` of that, and so on: with 0.5 and 2, at a quarter and a half."""

    within: Literal["rank", "all"] = "rank"
    """Who is ranked against whom. `rank`: variants of one rank, so that the best of every rank is
    trained to its end and ranks can be compared. `all`: every variant against every other."""


class SweepSection(Section):
    """`tunefork sweep`: variants of the recipe, trained together over one base. Each list below
    holds the values tried of the recipe field of its name; an empty one varies nothing. Judged by
    `compare.primary_metric` and `compare.margin`."""

    rank: tuple[PositiveInt, ...] = ()
    """`lora.rank`. Alpha stays, which keeps the best learning rate nearly the same."""

    alpha: tuple[PositiveFloat, ...] = ()
    """`lora.alpha`."""

    scaling: tuple[Scaling, ...] = ()
    """`lora.scaling`."""

    targets: tuple[Targets, ...] = ()
    """`lora.targets`, each a keyword or a list of module names."""

    dropout: tuple[Share, ...] = ()
    """`lora.dropout`."""

    learning_rate: tuple[PositiveFloat, ...] = ()
    """`train.learning_rate`."""

    schedule: tuple[Schedule, ...] = ()
    """`train.schedule`."""

    warmup_share: tuple[Share, ...] = ()
    """`train.warmup_share`."""

    weight_decay: tuple[Annotated[float, Field(ge=0.0)], ...] = ()
    """`train.weight_decay`."""

    batch_size: tuple[PositiveInt, ...] = ()
    """`train.batch_size`."""

    epochs: tuple[PositiveFloat, ...] = ()
    """`train.epochs`."""

    max_steps: tuple[PositiveInt, ...] = ()
    """`train.max_steps`."""

    seed: tuple[Seed, ...] = ()
    """`train.seed`: the order of the examples, adapter initialisation and dropout; which examples
    there are stays (`data.seed`). Variants that differ in it alone are one configuration: their
    figures are averaged, and from three on training's variance is in every interval."""

    data: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """`data.train`: other mixtures, judged on the same `data.eval`, which must be given."""

    search: Literal["grid", "random"] = "grid"
    """`grid`: every combination. `random`: `count` of them, each with every seed."""

    count: PositiveInt | None = None
    """`random`: how many combinations."""

    search_seed: Seed = 0
    """`random`: which."""

    halving: HalvingSection | None = None
    """Drop the worse early; null: every variant trains to its end."""

    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training examples held back to choose by (which variants are dropped, the
    learning rate of each rank), the same for all. Evaluation examples are used for no choice. Where
    `train.validate_every_steps` is set, `train.validation_share` holds instead."""

    together: PositiveInt | None = None
    """Most variants that train at one time; null: as many as the plan says fit in memory."""

    @model_validator(mode="after")
    def _search_is_whole(self) -> Self:
        if (self.search == "random") != (self.count is not None):
            raise ValueError(
                "count: says how many combinations search: random draws; give both, or neither"
            )
        return self


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
    sweep: SweepSection = SweepSection()

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
        if self.train.keep == "best" and self.train.validate_every_steps is None:
            raise ValueError(
                "train.keep: best is the state with the lowest validation loss, and none is "
                "measured; set train.validate_every_steps"
            )
        lists: dict[str, object] = {
            "data.labels": self.data.labels,
            "lora.targets": self.lora.targets,
            "lora.modules_to_save": self.lora.modules_to_save or None,
            "model.add_tokens": self.model.add_tokens or None,
            "evaluate.metrics": self.evaluate.metrics,
            "compare.methods": self.compare.methods,
            "compare.seeds": self.compare.seeds,
            "train.trackers": self.train.trackers,
            **{f"sweep.{name}": value for name, value in self.sweep},
        }
        may_be_empty = {"train.trackers", *(field for field in lists if field.startswith("sweep."))}
        for field, values in lists.items():
            if isinstance(values, tuple) and not values and field not in may_be_empty:
                raise ValueError(f"{field}: is an empty list; name at least one")
            if isinstance(values, tuple) and len(set(values)) < len(values):
                raise ValueError(f"{field}: holds the same value twice")
        self._check_full_trains_all()
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

    def _check_full_trains_all(self) -> None:
        """Options of deltas alone are refused where `method` has none; `compare` may have both."""
        chosen = {"dora": self.lora.dora, "modules_to_save": bool(self.lora.modules_to_save)}
        for field, is_set in chosen.items():
            if is_set and self.method is Method.FULL:
                raise ValueError(
                    f"lora.{field}: is set, but method full trains every weight and has no deltas; "
                    "leave it out, or choose lora or qlora"
                )

    @property
    def data_seed(self) -> int:
        """By which examples are chosen."""
        return self.train.seed if self.data.seed is None else self.data.seed

    def learning_rate(self, method: Method) -> float:
        """Peak learning rate for `method` where no search chose one."""
        if self.train.learning_rate is not None:
            return self.train.learning_rate
        rates = self.compare.learning_rates[method]
        if rates and rates != _LEARNING_RATES[method]:
            return rates[len(rates) // 2]
        return 2e-5 if method is Method.FULL else 2e-4
