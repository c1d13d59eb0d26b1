"""Causal attention within segments, without a mask: what a GPU trains with.

transformers makes a dense mask of packed rows; making it waits for the GPU (its check ends in
`.item()`), which breaks CUDA-graph capture too, and a mask leaves SDPA only its slow kernel. Here
the segments' starts take its place, as the keyword arguments that transformers' models hand on to
flash attention. Two kernels take the work:

    rows that are one segment each   SDPA without a mask, cuDNN first: the fastest on Hopper, but it
                                     plans anew for every shape (hence `bucket.WHOLE_ROWS`)
    anything else                    FlashAttention 2 over segments of various lengths (Dao 2023,
                                     https://arxiv.org/abs/2307.08691), PyTorch's own copy

Both take grouped key-value heads as they are. Neither reads a number off the GPU. Under
`torch.use_deterministic_algorithms` PyTorch rules cuDNN out, and flash's backward pass adds up in a
fixed order. What these kernels cannot express is refused (`refusal`), never left out;
`packed_probe.py` finds that out before training.

Shape legend: B rows, T tokens of a row, N = B * T, H query heads, K key-value heads, E features of
a head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tunefork.data.bucket import WHOLE_ROWS, limit
from tunefork.data.pack import Segments
from tunefork.model import kept_attention
from tunefork.model.attention_reference import reference
from tunefork.model.kept_attention import Results

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def in_place_of_mask(segments: Segments, length: int) -> dict[str, Any]:
    """Keyword arguments for a transformers model: rows of `length` tokens in these segments.

    The greatest length is rounded up to a power of two: layers are compiled or captured for it. A
    mask that is ready made (of 4 dimensions) keeps transformers from making one; this is none, and
    of a dtype that no kernel takes for one.
    """
    longest = limit(segments.longest)
    return {
        "attention_mask": segments.starts[:1].view(1, 1, 1, 1),
        "cu_seq_lens_q": segments.starts,
        "cu_seq_lens_k": segments.starts,
        "max_length_q": longest,
        "max_length_k": longest,
        "whole_rows": segments.is_uniform and length % WHOLE_ROWS == 0,
    }


def packed_attention(
    module: nn.Module,
    query_bhte: Tensor,
    key_bkte: Tensor,
    value_bkte: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    whole_rows: bool,
    sliding_window: int | None = None,
    attention_results: Results | None = None,
    **kwargs: Any,
) -> Tensor:
    """(B, T, H, E). The keyword arguments are `in_place_of_mask`'s and the architecture's own, and
    `attention_results` of a layer that keeps them for a second run.

    Raises ValueError for what the kernels cannot express.
    """
    why = refusal(module, query_bhte, key_bkte, value_bkte, dropout=dropout, **kwargs)
    if why is not None:
        raise ValueError(f"{type(module).__name__}: {why} cannot be had without a mask")
    rows, heads, length, features = query_bhte.shape
    scale = features**-0.5 if scaling is None else scaling
    is_whole = whole_rows and (sliding_window is None or sliding_window >= length)
    if attention_results is not None and is_whole:
        if kept_attention.takes_whole_rows(attention_results, query_bhte):
            return kept_attention.whole_rows(
                attention_results, query_bhte, key_bkte, value_bkte, scale=scale
            )
    elif is_whole:
        with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
            return F.scaled_dot_product_attention(
                query_bhte,
                key_bkte,
                value_bkte,
                is_causal=True,
                scale=scale,
                enable_gqa=heads != key_bkte.shape[1],
            ).transpose(1, 2)
    q_nhe, k_nke, v_nke = (
        states.transpose(1, 2).flatten(0, 1) for states in (query_bhte, key_bkte, value_bkte)
    )
    kernel: Callable[..., Tensor] = flash if query_bhte.is_cuda else reference
    if attention_results is not None:
        kernel = partial(kept_attention.segments, attention_results)
    out_nhe = kernel(
        q_nhe, k_nke, v_nke, cu_seq_lens_q, max_length_q, scale=scale, window=sliding_window
    )
    return out_nhe.view(rows, length, heads, features)


def refusal(
    module: nn.Module,
    query_bhte: Tensor,
    key_bkte: Tensor,
    value_bkte: Tensor,
    *,
    dropout: float,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> str | None:
    """What of this call the kernels cannot express."""
    features = query_bhte.shape[-1]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            return name
    if not is_causal:
        return "attention to later tokens"
    if dropout > 0.0:
        return "dropout in attention"
    if value_bkte.shape[-1] != features or features % 8 or features > 256:
        return f"a head of {features} features (values {value_bkte.shape[-1]})"
    if key_bkte.shape[2] != query_bhte.shape[2]:
        return "a cache of keys and values"
    if query_bhte.is_cuda and query_bhte.dtype not in (torch.bfloat16, torch.float16):
        return f"attention in {query_bhte.dtype}"
    return None


def flash(
    q_nhe: Tensor,
    k_nke: Tensor,
    v_nke: Tensor,
    starts: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """`reference` by PyTorch's flash attention, (N, H, E), with its gradient; CUDA, half floats."""
    made = kept_attention.flash_with_sums(
        q_nhe, k_nke, v_nke, starts, longest, scale=scale, window=window
    )
    return made[0]
