"""`train:`: the optimisation, the same for every method."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from tunefork.recipe.section import (
    Checkpointing,
    CheckpointingChoice,
    Compile,
    PositiveFloat,
    PositiveInt,
    Schedule,
    Section,
    Seed,
    Share,
)


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

    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this global L2 norm; null: never."""

    precision: Literal["auto", "bf16", "int8", "fp32"] = "auto"
    """Dtype of weights and activations in the forward pass. `int8`: products with a frozen base in
    whole numbers of 8 bits over a scale a row, for methods that have one (lora, qlora; `full` then
    computes in bf16), with everything else in bf16. Made for Hopper GPUs; others from Ampere on
    have it too, not measured; a CPU computes it slowly. `auto`: int8 on a Hopper GPU where its gate
    was passed for the model's family, method and size and int8 is faster (train/int8_gate.yaml; so
    far nowhere), the run has at least 100 steps, and two batches of its own agree in both (run.json
    has the figures); else bf16 on a GPU and on a CPU with bf16 instructions; else fp32. `train` and
    the final runs of `compare` choose so; searches, sweeps and groups take bf16. int8 is for
    training alone: what is evaluated or generated is computed in bf16, as a server does."""

    activation_checkpointing: CheckpointingChoice = "auto"
    """What is kept for the backward pass. `none`: every activation. `full` (or true): each layer's
    input, and the layer runs again. `offload`: those inputs too wait in host memory, copied beside
    the computation (compiled, attention's results with them). `selective`: the results of large
    products; the rest is made again (needs `compile`; without it, as `full`). The gradients are the
    same. `auto`: the plan picks, for each method, the fastest (none, selective, full, offload, in
    this order) that fits in the free memory of the GPU at the high end of the plan's interval; on a
    CPU `none`, or `full` where that does not fit in its memory; `full` on a GPU for a model that
    cannot be planned. run.json says what it was, and a stopped run goes on with the same."""

    compile: Compile = "auto"
    """Compile the layers (torch.compile) and, where launching a pass's kernels takes longer than
    running them, replay it as one CUDA graph. Costs 15 to 60 s at the start of a first run; the
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
    cheapest change; where captured passes (`compile`) keep memory, the step is first taken again
    without them. `shrink`: the step is taken again in micro-batches of half the tokens, down to one
    row at a time, and so are those after it; the gradient is the same but for rounding."""

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

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp8(cls, value: object) -> object:
        if value == "fp8":
            raise ValueError("fp8 is no more; set int8, which is faster and trains nearer to bf16")
        return value
