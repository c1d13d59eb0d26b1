"""Keys and values of all running requests: two tensors a layer, in which each request has a region.

The tensors belong to the attention modules (`kv_keys`, `kv_values`): so one compiled layer serves
all layers, and CUDA graphs find them where they were. How many heads of which size a layer has, and
whether its attention can be had at all, is not read from a list of architectures but seen in one
pass over a few tokens.

Shape legend: S tokens of the cache, K key-value heads, E features of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tunefork.errors import ModelError
from tunefork.serve.engines import attention
from tunefork.serve.engines.flash import flash_agrees
from tunefork.serve.engines.regions import UNIT, Region, Regions
from tunefork.serve.engines.trial import ROOM

_PROBE = "tunefork_serving_probe"
_REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")
"""Attention's keyword arguments that the kernels here cannot express."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One attention layer's keys and values."""

    module: nn.Module
    kv_heads: int
    key_features: int
    value_features: int
    query_heads: int
    window: int | None

    @property
    def groups(self) -> int:
        """Query heads of one key-value head."""
        return self.query_heads // self.kv_heads

    @property
    def features(self) -> int:
        """Numbers kept for one token."""
        return self.kv_heads * (self.key_features + self.value_features)


@torch.no_grad()
def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """Of every attention layer, in order. Leaves `model` with serving's attention.

    Raises ModelError for a model whose attention cannot be had here.
    """
    seen: list[LayerShape] = []
    name = type(model).__name__
    if not model._supports_attention_backend:
        raise ModelError(
            f"{name}: transformers gives its attention no interface, which the embedded engine "
            "needs; serve it with --engine vllm"
        )
    AttentionInterface.register(_PROBE, _note)
    model.set_attn_implementation(_PROBE)
    ids = torch.zeros(1, 4, dtype=torch.int64, device=model.device)
    model(input_ids=ids, position_ids=ids, use_cache=False, reads=seen)
    if not seen or len({id(layer.module) for layer in seen}) != len(seen):
        raise ModelError(f"{name}: its attention layers do not run once each; use --engine vllm")
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return seen


def _note(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    reads: list[LayerShape] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention that adds the layer's shape to `reads`. transformers keeps this function for as
    long as the process lives: it must hold no layer itself."""
    name = type(module).__name__
    if asked := [what for what in _REFUSED if kwargs.get(what) is not None]:
        raise ModelError(f"{name}: the embedded engine has no attention with {asked[0]}")
    if reads is None:
        raise ModelError(f"{name}: its layers do not hand attention its arguments")
    if not getattr(module, "is_causal", True):
        raise ModelError(f"{name}: its attention sees later tokens")
    window = kwargs.get("sliding_window")
    features = (key.shape[3], value.shape[3])
    reads.append(LayerShape(module, key.shape[1], *features, query.shape[1], window))
    return torch.zeros_like(query[..., : value.shape[3]]).transpose(1, 2), None


class Cache:
    """The tensors, and who has which part of them."""

    def __init__(
        self, layers: list[LayerShape], num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers = layers
        self.regions = Regions(num_tokens)
        self.total = self.regions.total
        self.trial_start = num_tokens
        """Where trials of adapters lie, behind all regions: a full cache holds none up. Each writes
        what it reads, and those of several passes are computed one after the other."""
        for layer in layers:
            widths = {"kv_keys": layer.key_features, "kv_values": layer.value_features}
            for name, features in widths.items():
                # Not zeroed: a CPU hands out memory when it is written. What is never handed out
                # as a region is read in place of what is not there, and must be finite.
                sizes = (num_tokens + ROOM, layer.kv_heads, features)
                kept = torch.empty(sizes, dtype=dtype, device=device)
                kept[:UNIT] = 0
                layer.module.register_buffer(name, kept, persistent=False)

    def move(self, region: Region, target: Region, tokens: int) -> None:
        """Copy the first `tokens` of `region` to `target`."""
        for pool in self._pools():
            pool[target.start : target.start + tokens] = pool[
                region.start : region.start + tokens
            ].clone()

    def _pools(self) -> list[Tensor]:
        names = ("kv_keys", "kv_values")
        return [getattr(layer.module, name) for layer in self.layers for name in names]


def bytes_a_token(layers: list[LayerShape], dtype: torch.dtype) -> int:
    """Of cache that one token takes."""
    return sum(layer.features for layer in layers) * dtype.itemsize


def takes_flash(layers: list[LayerShape], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether every layer's attention can be had of PyTorch's FlashAttention: it is tried."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    kinds = {
        (layer.query_heads, layer.kv_heads, layer.key_features, layer.value_features)
        for layer in layers
    }
    try:
        return all(
            key == value and key % 8 == 0 and key <= 256 and flash_agrees(h, k, key, dtype)
            for h, k, key, value in kinds
        )
    except (RuntimeError, TypeError):  # this GPU or this PyTorch has it not
        return False
