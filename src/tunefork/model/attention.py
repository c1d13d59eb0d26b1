"""The attention function that models are loaded with: which way a call takes.

    told segments, no mask        `packed_attention.py`: a training pass on a GPU
    short rows on a CPU           plain batched products, below
    everything else               PyTorch's SDPA as transformers calls it, with its mask

PyTorch's CPU flash attention is slow backwards in bf16: for 8 x 128 tokens, 9 heads over 3
key-value heads of 64, forward and backward take 15 ms against 6 ms by batched products (2-core
EPYC, torch 2.13). The scores of a whole row are held at once, so this pays only for short rows.
Grouped query heads are folded into the query length, so keys and values are not repeated.

Shape legend: B rows, H query heads, K key-value heads, T queries, U keys, E features of a head
(the values' may differ in number: multi-head latent attention).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunefork.model.packed_attention import packed_attention

NAME = "tunefork"
"""Pass as `attn_implementation` after `register()`."""

LONGEST_ROW = 512


def attention(
    module: nn.Module,
    query_bhte: Tensor,
    key_bkue: Tensor,
    value_bkue: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: returns (B, T, H, E). The mask is boolean, True = seen.

    Raises ValueError where segments were given to a model that does not hand them on.
    """
    if kwargs.get("cu_seq_lens_q") is not None:
        packed_bthe = packed_attention(
            module, query_bhte, key_bkue, value_bkue, dropout=dropout, scaling=scaling, **kwargs
        )
        return packed_bthe, None
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        raise ValueError(f"{type(module).__name__} is not told the segments of packed rows")
    batch, heads, length, features = query_bhte.shape
    # Architectures whose attention SDPA cannot express at all are loaded as "eager" (`load.py`).
    unusual = dropout > 0.0 or kwargs.get("position_bias") is not None
    if length > LONGEST_ROW or query_bhte.device.type != "cpu" or unusual:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query_bhte,
            key_bkue,
            value_bkue,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
        return output
    kv_heads, keys = key_bkue.shape[1], key_bkue.shape[2]
    scale = features**-0.5 if scaling is None else scaling
    folded = query_bhte.reshape(batch, kv_heads, -1, features)
    scores = (folded @ key_bkue.transpose(-1, -2)).view(batch, heads, length, keys) * scale
    if attention_mask is None and length > 1:
        attention_mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[..., :keys], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).view(batch, kv_heads, -1, keys)
    output_bhte = (weights @ value_bkue).view(batch, heads, length, -1)
    return output_bhte.transpose(1, 2), None


def register() -> None:
    """Make `NAME` known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
