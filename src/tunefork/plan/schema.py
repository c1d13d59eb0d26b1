"""What a plan says: the schema of `tunefork plan --json`.

Every figure here is predicted. Memory has an interval (low, mid, high) that comes from the errors
of predictions where they were measured; time has one too, as `step_s_interval`.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tunefork.recipe import Checkpointing

Part = Literal["weights", "gradients", "optimizer", "activations", "logits", "workspace"]
PhaseName = Literal["load", "forward_backward", "optimizer", "evaluate", "save"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Interval(_Model):
    """A predicted figure."""

    low: float
    mid: float
    high: float


class Phase(_Model):
    """One phase of a run; the run's peak is the highest phase's, not a sum."""

    tensor_bytes: int
    """Most that tensors take on the device at one time in this phase."""
    parts: dict[Part, int]
    """What that is made of; sums to `tensor_bytes`."""


class MachinePlan(_Model):
    """The machine planned for."""

    gpu: str
    """The catalogue's id, or "cpu"."""
    count: int
    memory_bytes: int
    """Of one GPU, or of the host."""
    usd_per_hour: float | None
    """Of all of it together."""
    note: str
    """Where rates and price come from."""


class WorkPlan(_Model):
    """How much is to be trained."""

    examples: int
    tokens: int
    """In one pass over the training examples, prompts included."""
    supervised_tokens: int
    epochs: float
    steps: int
    batch_size: int
    """Examples of one optimiser step."""
    rows: int
    """Of the largest micro-batch."""
    length: int
    """Tokens of its rows."""
    is_masked: bool
    """Rows hold several examples or padding, so attention needs a mask."""
    note: str
    """Where these numbers come from: the data, or assumptions."""


class MethodPlan(_Model):
    """What one method takes on the machine."""

    fits: bool
    """Whether the high end of `peak_process_bytes` is within the memory of each device."""
    may_fit: bool
    """Whether its low end is."""
    margin_bytes: int
    """Memory left at the high end; negative where it does not fit."""
    activation_checkpointing: Checkpointing
    """How activations are kept: the recipe's, or what its `auto` comes to on this machine."""
    total_params: int
    trainable_params: int
    peak_tensor_bytes: Interval
    """On each device: what `torch.cuda.max_memory_allocated` will say."""
    peak_process_bytes: Interval
    """The same with the CUDA context, library workspaces and fragmentation."""
    phases: dict[PhaseName, Phase]
    step_s: float
    """Of one optimiser step."""
    step_s_interval: tuple[float, float]
    tokens_per_s: float
    total_s: float
    """All optimiser steps; neither loading nor evaluation."""
    cost_usd: float | None
    """Of `total_s` at the machine's price."""
    artifact_bytes: int
    """Of what is saved: adapter or model."""
    largest_micro_batch_tokens: int | None
    """Most tokens in one forward pass that fit, at this length; None where one row does not fit.
    Where the recipe leaves checkpointing to the plan, by the kind that keeps the least."""
    largest_length: int | None
    """Longest single row that fits, likewise, at most the model's context; None where not even 128
    tokens do."""
    next_option: str | None
    """Where it does not fit: the cheapest change that would make it fit."""


class Plan(_Model):
    """The methods side by side, on one machine."""

    model: str
    total_params: int
    machine: MachinePlan
    work: WorkPlan
    methods: dict[str, MethodPlan]
    """Keys: lora, qlora, full."""
    notes: list[str] = Field(default_factory=list)
    """What was assumed, and how far the prediction can be trusted."""
