"""A shallow model on the meta device, built for a method by the functions that build it to train.

Built once in a process for each way of building: plans for several GPUs, batches and kinds of
checkpointing ask for the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.model.build import build
from tunefork.model.fused import FusedLinear, fuse
from tunefork.model.head import Head
from tunefork.model.linear import Nf4Linear
from tunefork.model.tokens import TokenHead
from tunefork.plan.attention import NAME
from tunefork.plan.capture import takes_segments
from tunefork.plan.optimizer import state_bytes
from tunefork.plan.shape import at_depth, on_meta
from tunefork.recipe import Checkpointing, FullSection, LoraSection, Method
from tunefork.train.engine import BaseForm, form_of

_SCALED_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
"""Settings by which an architecture changes its logits after the head; `model.head` measures this
where there are weights."""


@dataclass(frozen=True, slots=True)
class Build:
    """How the model is built."""

    method: Method
    lora: LoraSection
    full: FullSection
    dtype: torch.dtype
    checkpointing: Checkpointing
    device: str
    """"cuda" or "cpu": whose kernels are stood in for."""
    new_ids: tuple[int, ...] = ()
    """Tokens that the recipe adds, whose rows are trained."""
    wants_int8: bool = False
    """`train.precision: int8`."""
    is_compiled: bool = False
    is_joint: bool = False
    """Its adapter stands for several that train together, whose MLPs run as written."""

    @property
    def modules(self) -> "Build":
        """The same for all builds whose modules are alike, however these run."""
        return replace(self, checkpointing="full", is_compiled=False)

    @property
    def releases(self) -> bool:
        """Weights are updated in the backward pass (`train/release.py`)."""
        return self.method is Method.FULL and self.full.gradient_release

    @property
    def form(self) -> BaseForm | None:
        """How the frozen base is kept."""
        return form_of(
            self.method,
            kind=self.device,
            dtype=self.dtype,
            wants_int8=self.wants_int8,
            is_dora=self.lora.dora,
        )


@dataclass(frozen=True, slots=True)
class Built:
    """A shallow model on the meta device, and what does not depend on a batch's shape."""

    model: PreTrainedModel
    head: Head
    trained: list[nn.Parameter]
    states: list[Tensor]
    """The optimiser's, as bytes."""


_BUILT: dict[Any, Built] = {}


def built(config: Any, made: Build) -> Built:
    """`config`'s model on the meta device, built as `made`."""
    key = (config.to_json_string(), made.modules)
    if key not in _BUILT:
        _BUILT[key] = _build(config, made)
    return _BUILT[key]


def _build(config: Any, made: Build) -> Built:
    model = on_meta(config, dtype=made.dtype, attention=NAME)
    model.config.pad_token_id = None  # GPT-2 looks for it among ids, of which there are none
    build(model, made.method, made.lora, seed=0, new_ids=made.new_ids)
    if made.form is not None:
        fuse(model, made.form.storage, made.form.products, torch.device("meta"))
    trained = [p for p in model.parameters() if p.requires_grad]
    sizes = state_bytes(trained, made.method, made.full)
    states = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
    head = _head(model, config, takes_segments=made.device == "cuda" and _takes_segments(model))
    return Built(model, head, trained, states)


def _takes_segments(model: PreTrainedModel) -> bool:
    """As `capture.takes_segments`, asked once for models that differ in depth and weights only."""
    key = at_depth(model.config, 1).to_json_string()
    if key not in _TAKES_SEGMENTS:
        _TAKES_SEGMENTS[key] = takes_segments(model)
    return _TAKES_SEGMENTS[key]


_TAKES_SEGMENTS: dict[str, bool] = {}


def _head(model: PreTrainedModel, config: Any, *, takes_segments: bool) -> Head:
    linear = model.get_output_embeddings()
    assert isinstance(linear, nn.Linear | TokenHead)
    text = config.get_text_config()
    is_plain = not any(getattr(text, name, None) for name in _SCALED_LOGITS)
    return Head(linear, is_plain=is_plain and linear.bias is None, takes_segments=takes_segments)


def weights(model: nn.Module) -> Iterator[Tensor]:
    """All that is there of a model whatever it is given, the state of 4-bit weights too."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, Nf4Linear):
            yield module.state.absmax
            yield module.state.state2.absmax
        if isinstance(module, FusedLinear):
            yield from module.group.weights
