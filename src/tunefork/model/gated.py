"""MLPs that do not keep h, what their `down` layer reads, between the passes (`kernels/gated.py`).

With bf16 products `down` is one function of gate and up (`kernels/gated_lora.py`), with int8
products the whole MLP one of x (`kernels/int8_gated.py`).

That is for a module that computes exactly down(silu(gate(x)) * up(x)) while it is trained. Which do
is not told by names: a twin of the module, with small random layers in the place of its three, has
to give what those layers give. The module stays where it is, with its layers: its class gets
another forward pass, one for all modules of the class, so that they share one compiled form.
"""

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunefork.kernels.gated import has_kernels
from tunefork.kernels.gated_lora import gated_lora, takes
from tunefork.kernels.int8_gated import int8_gated
from tunefork.kernels.int8_gated import takes as takes_int8
from tunefork.model.fused import FusedLinear
from tunefork.model.linear import LoraLinear

_LEAST_CAPABILITY = (8, 0)
"""Of a GPU: older ones have no bf16."""
_TOKENS, _FEATURES, _INNER = 5, 8, 12
"""Of a twin."""
_SCALES = (1.0, 100.0)
"""Of its inputs: large ones show limits that a module sets to what it multiplies."""
_BOUND = 1e-5
"""Relative error of a twin's outputs, fp32."""


class Gated(nn.Module):
    """What such a module's class gets: another forward pass."""

    gated_names: tuple[str, str, str]
    """Its gate, up and down."""

    def forward(self, x_d: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., D) -> (..., D)"""
        if self.training and not (args or kwargs):
            gate, up, down = (getattr(self, name) for name in self.gated_names)
            # Since then its layers may have been replaced by others, or been given hooks.
            is_as_found = isinstance(down, LoraLinear) and _group(down) is not None
            if is_as_found and not _has_hooks(down) and has_kernels(x_d, down.lora_a.shape[0]):
                if _group(down).layout.products == "bf16":
                    return _with_bias(down, _in_bf16(gate, up, down, x_d))
                if _are_int8(gate, up):
                    return _with_bias(down, _in_int8(gate, up, down, x_d))
        as_written: Tensor = super().forward(x_d, *args, **kwargs)
        return as_written


def _in_bf16(gate: nn.Module, up: nn.Module, down: LoraLinear, x_d: Tensor) -> Tensor:
    gate_d, up_d = gate(x_d), up(x_d)  # in this order, as in their group
    group = _group(down)
    return gated_lora(gate_d, up_d, group.layout, group.weights, down.lora_a, down.lora_b)


def _in_int8(gate: LoraLinear, up: LoraLinear, down: LoraLinear, x_d: Tensor) -> Tensor:
    pair, last = _group(gate), _group(down)
    lora_a, lora_b = [gate.lora_a, up.lora_a], [gate.lora_b, up.lora_b]
    of_pair = pair.layout, pair.weights, lora_a, lora_b
    return int8_gated(x_d, *of_pair, last.layout, last.weights, down.lora_a, down.lora_b)


def _with_bias(down: LoraLinear, y_d: Tensor) -> Tensor:
    bias_o = down.base.bias
    return y_d if bias_o is None else y_d + bias_o


def _are_int8(*layers: Any) -> bool:
    """Whether `int8_gated` can have gate and up: it calls neither, and adds no bias to them."""
    return all(
        isinstance(layer, LoraLinear)
        and _group(layer) is not None
        and not (layer.base.bias is not None or _has_hooks(layer))
        for layer in layers
    )


def prepare_gated(model: nn.Module) -> list[nn.Module]:
    """Have `model`'s MLPs run so while they are trained, in place; returns those that do."""
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return []
    for module in model.modules():
        if not isinstance(module, Gated) and (names := _find(module)) is not None:
            kind: Any = type(module)
            module.__class__ = _with_gate(kind)
            module.gated_names = names  # type: ignore[assignment]
    return [module for module in model.modules() if isinstance(module, Gated)]


@cache
def _with_gate(kind: Any) -> Any:
    return type(kind.__name__, (Gated, kind), {"__module__": kind.__module__})


def _find(module: nn.Module) -> tuple[str, str, str] | None:
    """What its gate, up and down are called, of a module that is one."""
    linear = {n: child for n, child in module.named_children() if _group(child) is not None}
    names = _names(linear) if len(linear) == 3 else None
    return names if names is not None and _computes(module, names) else None


def _group(module: nn.Module) -> Any:
    """Whose it is, of a linear layer of a fused group with no delta or one that is the group's."""
    if isinstance(module, LoraLinear):
        return _group(module.base) if module.base_adds_delta else None  # type: ignore[arg-type]
    return module.group if isinstance(module, FusedLinear) else None


def _names(linear: dict[str, nn.Module]) -> tuple[str, str, str] | None:
    """Of three layers two that share a group, in its order, and one that has one to itself."""
    groups = {name: _group(layer) for name, layer in linear.items()}
    single = [name for name, group in groups.items() if len(group.layout.sizes) == 1]
    if len(single) != 1:
        return None
    [down], layer = single, linear[single[0]]
    first, second = sorted((n for n in linear if n != down), key=lambda n: _index(linear[n]))
    is_pair = groups[first] is groups[second] and len(groups[first].layout.sizes) == 2
    is_plain = isinstance(layer, LoraLinear) and not _has_hooks(layer)
    if is_pair and is_plain and _takes(groups[first], groups[down], linear[first], linear[second]):
        return first, second, down
    return None


def _takes(pair: Any, last: Any, gate: nn.Module, up: nn.Module) -> bool:
    """Whether one of the two functions can do an MLP of these groups."""
    if last.layout.products == "bf16":
        return takes(last.layout)
    return takes_int8(pair.layout, last.layout) and _are_int8(gate, up)


def _index(layer: nn.Module) -> int:
    """A layer's place in its group."""
    base: Any = layer.base if isinstance(layer, LoraLinear) else layer
    index: int = base.index
    return index


def _has_hooks(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


@torch.no_grad()
def _computes(module: nn.Module, names: tuple[str, str, str]) -> bool:
    """Whether a twin of `module`, trained, is down(silu(gate(x)) * up(x)) of small layers."""
    others = {name: child for name, child in module.named_children() if name not in names}
    own: list[Any] = [*module._parameters.values(), *module._buffers.values()]
    own += [t for child in others.values() for t in (*child.parameters(), *child.buffers())]
    if own or _has_hooks(module):
        return False
    random = torch.Generator().manual_seed(0)
    gate, up = (_draw(random, _INNER, _FEATURES) for _ in range(2))
    down = _draw(random, _FEATURES, _INNER)
    twin = copy.copy(module)
    twin._modules = {name: copy.deepcopy(child) for name, child in others.items()}
    for name, weight in zip(names, (gate, up, down), strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        twin._modules[name] = layer
    twin.train()
    for scale in _SCALES:
        x = scale * _draw(random, 1, _TOKENS, _FEATURES)
        wanted = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        try:
            error = (twin(x) - wanted).norm()
        except Exception:  # whatever a forward pass of others' code cannot do with small layers
            return False
        if not bool(error <= _BOUND * wanted.norm()):
            return False
    return True


def _draw(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")
