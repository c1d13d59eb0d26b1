"""Attention of one pass over many requests: each token sees its own request's keys and values.

A pass is one row of tokens, those of a request side by side: one token of each request that
decodes, then pieces of prompts. Keys and values of the new tokens are written to the cache, and two
ways read them:

    flash    a GPU in bf16 or fp16: PyTorch's FlashAttention 2 (`flash.py`)
    sdpa     everything else, and the definition: PyTorch's SDPA (`sdpa.py`)

The function is transformers' attention interface, so that models stay transformers' own. What a
model asks of attention beyond a scale and a sliding window is refused when the engine starts
(`cache.py`).

Shape legend: N tokens of the pass, R rows (requests), S tokens of the cache, H query heads,
K key-value heads, E features of a head, L longest row of a group.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from tunefork.serve.engines.flash import flash
from tunefork.serve.engines.reads import Reads
from tunefork.serve.engines.sdpa import sdpa

NAME = "tunefork_serving"
"""The `attn_implementation` of a model that is served."""


def attention(
    module: nn.Module,
    query_1hne: Tensor,
    key_1kne: Tensor,
    value_1kne: Tensor,
    attention_mask: Tensor | None,
    *,
    reads: Reads,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, N, H, E). `module` holds its part of the cache."""
    keys_ske, values_ske = module.kv_keys, module.kv_values
    assert isinstance(keys_ske, Tensor) and isinstance(values_ske, Tensor)
    keys_ske.index_copy_(0, reads.write_n, key_1kne[0].transpose(0, 1))
    values_ske.index_copy_(0, reads.write_n, value_1kne[0].transpose(0, 1))
    query_nhe = query_1hne[0].transpose(0, 1)
    scale = query_nhe.shape[-1] ** -0.5 if scaling is None else scaling
    way = flash if reads.spans is None else sdpa
    return way(query_nhe, keys_ske, values_ske, reads, scale, sliding_window)[None], None


def register() -> None:
    """Make `NAME` known to transformers. It has no mask function, so that no mask is made."""
    AttentionInterface.register(NAME, attention)
