"""How a model's decoder layers run while they are trained: as written or compiled, kept or redone.

Every layer of a model runs the same compiled code with its own weights, so a model of 32 layers is
compiled once. Only passes that will be differentiated go through it: evaluation and generation have
other shapes, and take the layers as written.

Checkpointing keeps a layer's input alone and runs the layer again in the backward pass (Chen et al.
2016, https://arxiv.org/abs/1604.06174). Within compiled code the compiler sees both runs and leaves
out of the second what no gradient needs, such as the MLP's last product.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

Checkpointing = Literal["none", "full"]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that the model is a stack of, in order."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def prepare_layers(
    model: PreTrainedModel, checkpointing: Checkpointing, *, compiles: bool, dynamic: bool | None
) -> None:
    """Have `model`'s layers run so while they are trained, in place.

    `dynamic` is torch.compile's: whether one compiled form serves every number of tokens.
    """
    run = _checkpointed if checkpointing == "full" else _plain
    if compiles:
        # A fused group remembers its outputs until its last member has asked for them, within one
        # run of the layer: nothing that the second run would have to do again.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        run = torch.compile(run, dynamic=dynamic)
    for layer in decoder_layers(model):
        layer.forward = partial(_forward, run, layer)  # type: ignore[method-assign]


def _forward(run: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if layer.training and torch.is_grad_enabled():
        return run(layer, *args, **kwargs)
    return type(layer).forward(layer, *args, **kwargs)


def _plain(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _checkpointed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(_plain, layer, *args, use_reentrant=False, **kwargs)
