"""`lora:` and `full:`: what is trained."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tunefork.recipe.section import PositiveFloat, PositiveInt, Scaling, Section, Share, Targets


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
    4 bytes a parameter, rounded stochastically like the weights, which must be `weights: bf16`. On
    a GPU these two update bf16 weights in one pass over weight, gradient and moments, without fp32
    copies. `adamw_8bit`: 8 bits by blocks of 256, 2 bytes a parameter (bitsandbytes; Dettmers et
    al. 2021, https://arxiv.org/abs/2110.02861). The default is the one that rounds nothing."""

    gradient_release: bool = False
    """Update each weight in the backward pass, as soon as its gradient is complete, and free that:
    gradients, 2 bytes a parameter in bf16, are never there together. The weights are the same, bit
    for bit. Needs steps of one micro-batch (`train.micro_batch_tokens` holds all of
    `train.batch_size`), `train.max_grad_norm: null`, as the global norm is known too late to clip
    by, and `train.on_out_of_memory: error`. A loss that is not finite, or a spike, is still met
    before the update; a gradient that is not finite is found after it: then the run fails, saves
    nothing, and goes on from its newest checkpoint. Off, as it lowers the peak only where
    activations are few beside the gradients: with checkpointing, and above all in small steps
    (predicted for 8B: 148 GiB either way without, 63 to 54 with it, 60 to 47 at 2,048 tokens)."""

    @model_validator(mode="after")
    def _check_moments(self) -> Self:
        if self.optimizer == "adamw_bf16" and self.weights != "bf16":
            raise ValueError(
                "optimizer: adamw_bf16 updates bf16 weights in place; set full.weights: bf16 too, "
                "or full.optimizer: adamw or adamw_8bit"
            )
        return self
