"""How a model's decoder layers run while they are trained: as written or compiled, kept or redone.

Every layer of a model runs the same compiled code with its own weights, so a model of 32 layers is
compiled once. Only passes that will be differentiated go through it: evaluation and generation have
other shapes, and take the layers as written.

    none        every activation that a gradient needs is kept
    selective   compiled only: what is quickly made again is made again (norms, activations,
                attention's forward pass), the results of the large products are kept
    full        a layer's input alone is kept, and the layer runs again in the backward pass (Chen
                et al. 2016, https://arxiv.org/abs/1604.06174); compiled, without what is made for
                its result alone (`rerun.py`)
    offload     full, and the inputs wait in host memory; compiled, attention's results too
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tunefork.errors import ModelError
from tunefork.model.bank_linear import BankLinear
from tunefork.model.fused import FusedLinear
from tunefork.model.gated import prepare_gated
from tunefork.model.kept_attention import has_cudnn
from tunefork.model.rerun import (
    may_hand_on,
    plainly,
    rerun,
    returns_one_tensor,
    shares_gradients,
    sparingly,
)
from tunefork.model.shelf import Held, Shelf
from tunefork.recipe import Checkpointing

_TwoRuns = Callable[[bool], tuple[Callable[..., Any], Callable[..., Any]]]
"""A layer's first and second run, for whether attention's result is kept."""


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that the model is a stack of, in order."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def prepare_layers(
    model: PreTrainedModel,
    checkpointing: Checkpointing,
    *,
    compiles: bool,
    dynamic: bool | None = None,
    gates: bool = True,
    compiler: Callable[..., Any] = torch.compile,
    shelf: Any = None,
    two_runs: _TwoRuns | None = None,
) -> None:
    """Have `model`'s layers run so while they are trained, in place.

    `dynamic` is torch.compile's: whether one compiled form serves every number of tokens. Without
    `gates` MLPs run as written (`gated.py`), as those of many adapters do. A plan, which computes
    nothing, has its own in the place of the `compiler`, the `shelf` (`shelf.py`) and
    the two compiled runs of a layer (`rerun.sparingly`, told whether to keep attention's result).
    Raises ModelError for checkpointing that the model has no layers for.
    """
    if gates:
        prepare_gated(model)
    is_random = draws(model)
    run: Callable[..., Any] = _as_written
    if checkpointing == "selective":
        run = partial(_checkpointed, _as_written, is_random)
    if compiles:
        # A fused group remembers its outputs until its last member has asked for them, within one
        # run of the layer: nothing that the second run would have to do again.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        # An NF4 weight is dequantised in both passes, the A and B of a bank are made one bf16
        # operand in both. The compiler would take the two for one, and keep it in between: for all
        # layers, as much as the bf16 model, or 5 GiB of sixteen adapters of ranks 8 to 64 on 8B.
        keeps_all = checkpointing in ("none", "selective")
        torch._functorch.config.cse = not (keeps_all and _makes_operands_twice(model))
        run = compiler(run, dynamic=dynamic)
    if checkpointing in ("full", "offload"):
        spare: _TwoRuns | None = None
        if compiles and not is_random:  # two codes might draw apart
            spare = two_runs or partial(_compiled_runs, model, partial(compiler, dynamic=dynamic))
        run = _run_again(run, model, checkpointing, is_random, spare, shelf or Shelf())
    layers = decoder_layers(model)
    if not layers and checkpointing != "none":
        raise ModelError(
            f"train.activation_checkpointing: {checkpointing} cannot be had, as "
            f"{type(model).__name__} has no decoder layers that transformers would checkpoint; set "
            "none"
        )
    for layer in layers:
        layer.forward = partial(_forward, run, layer)
    # With a second run no form hangs on that (`rerun.py`); and above a first layer that trains
    # nothing there may be others that need no gradient either.
    keeps = checkpointing in ("none", "selective")
    if compiles and keeps and any(p.requires_grad for m in layers[:1] for p in m.parameters()):
        layers[0].forward = partial(_forward_as_others, run, layers[0])


def compile_last_norm(model: PreTrainedModel, compiler: Callable[..., Any] = torch.compile) -> None:
    """Have the norm behind `model`'s layers run compiled while it is trained, in place.

    As written it is a dozen passes over the hidden states, some in fp32: 2 ms of a step of 16,384
    tokens of an 8B model.
    """
    run = compiler(_norm_as_written, dynamic=True)
    for norm in _norms_behind(model):
        norm.forward = partial(_forward, run, norm)


def _norms_behind(model: PreTrainedModel) -> list[nn.Module]:
    """Norms that stand beside the list of `model`'s layers and after it."""
    layers = decoder_layers(model)
    for stack in model.modules():
        children = list(stack.children())
        for at, child in enumerate(children):
            if layers and isinstance(child, nn.ModuleList) and layers[0] in child:
                return [m for m in children[at:] if "norm" in type(m).__name__.lower()]
    return []


def _norm_as_written(norm: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(norm).forward(norm, *args, **kwargs)


def _compiled_runs(
    model: PreTrainedModel, compiler: Callable[..., Any], keeps_attention: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    first, again = sparingly(_as_written, keeps_attention, has_cudnn(model.device))
    return compiler(first), compiler(again)


def _run_again(
    run: Callable[..., Any],
    model: PreTrainedModel,
    checkpointing: Checkpointing,
    is_random: bool,
    spare: _TwoRuns | None,
    shelf: Any,
) -> Callable[..., Any]:
    """What runs a layer that keeps little, as `run` does; by `spare`'s two runs where it is given
    and the model's layers are such as `rerun` takes."""
    keeps_attention = checkpointing == "offload"
    first, again = plainly(run) if spare is None else spare(keeps_attention)
    if checkpointing == "offload":
        return partial(rerun, first, again, shelf, is_random)
    if spare is not None and _are_simple(model):
        return partial(_rerun_or_checkpointed, partial(rerun, first, again, Held(), False), run)
    return partial(_checkpointed, run, is_random)


def shared_weights(model: PreTrainedModel) -> list[str]:
    """What each layer but the first calls the weights that several of them have."""
    seen, found = set[nn.Parameter](), []
    for layer in decoder_layers(model):
        named = list(layer.named_parameters())
        found += [name for name, parameter in named if parameter in seen]
        seen.update(parameter for _, parameter in named)
    return found


def draws(model: PreTrainedModel) -> bool:
    """Whether a layer draws random numbers, which a second run has to draw again."""
    rates = (
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if "drop" in name or "jitter" in name or (name == "p" and isinstance(module, nn.Dropout))
    )
    return any(isinstance(rate, float) and rate > 0.0 for rate in rates)


def _makes_operands_twice(model: PreTrainedModel) -> bool:
    return any(
        isinstance(module, BankLinear)
        or (isinstance(module, FusedLinear) and module.group.layout.storage == "nf4")
        for module in model.modules()
    )


def _forward(run: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if layer.training and torch.is_grad_enabled():
        return run(layer, *args, **kwargs)
    return _as_written(layer, *args, **kwargs)


def _forward_as_others(run: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`_forward` of the first layer, where its input counts as one that needs a gradient.

    Over a frozen embedding it needs none, and would be a second form to compile: a third of a first
    step, for a product in each step that is a 600th of it. Given by its name, it stays as it is.
    """
    x = args[0] if args and layer.training and torch.is_grad_enabled() else None
    if isinstance(x, Tensor) and not x.requires_grad:
        args = (x.detach().requires_grad_(), *args[1:])
    return _forward(run, layer, *args, **kwargs)


def _as_written(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _are_simple(model: PreTrainedModel) -> bool:
    """Whether `rerun` takes its layers; PyTorch's own takes any."""
    is_one = all(returns_one_tensor(layer) for layer in decoder_layers(model))
    return is_one and not shared_weights(model)


def _rerun_or_checkpointed(
    ours: Callable[..., Any],
    run: Callable[..., Any],
    layer: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Any:
    others = (*args[1:], *kwargs.values())
    if shares_gradients(*others) or may_hand_on(*others):
        return _checkpointed(run, False, layer, *args, **kwargs)
    return ours(layer, *args, **kwargs)


def _checkpointed(
    run: Callable[..., Any], draws: bool, layer: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    return checkpoint(run, layer, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)
