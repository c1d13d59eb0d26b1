"""Serving's attention by plain SDPA: the definition, and what a CPU takes.

Decoding rows of similar length go at once, each piece of a prompt by itself.

Shape legend as in `attention.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunefork.serve.engines.reads import Reads, Span


def sdpa(
    query_nhe: Tensor,
    keys_ske: Tensor,
    values_ske: Tensor,
    reads: Reads,
    scale: float,
    window: int | None,
) -> Tensor:
    """`flash` by plain SDPA: the definition."""
    assert reads.spans is not None
    # Zeros for tokens that only fill a pass up: what they write must be finite.
    out_nhe = query_nhe.new_zeros(*query_nhe.shape[:2], values_ske.shape[-1])
    decoding = [span for span in reads.spans if span.new == 1]
    at = 0
    while at < len(decoding):
        group = _similar(decoding, at)
        rows = slice(group[0].first, group[0].first + len(group))
        out_nhe[rows] = _decode(
            query_nhe[rows], keys_ske, values_ske, group, reads.made, scale, window
        )
        at += len(group)
    for span in reads.spans:
        if span.new > 1:
            rows = slice(span.first, span.first + span.new)
            out_nhe[rows] = _piece(
                query_nhe[rows], keys_ske, values_ske, span, reads.made, scale, window
            )
    return out_nhe


def _similar(decoding: list[Span], at: int) -> list[Span]:
    """Spans from `at` on that lie side by side in the pass, none twice as long as another."""
    group = [decoding[at]]
    low = high = max(decoding[at].used, 64)
    for span in decoding[at + 1 :]:
        low, high = min(low, max(span.used, 64)), max(high, span.used)
        if span.first != group[-1].first + 1 or high > 2 * low:
            break
        group.append(span)
    return group


def _decode(
    query_rhe: Tensor,
    keys_ske: Tensor,
    values_ske: Tensor,
    group: list[Span],
    made: dict[Any, Any],
    scale: float,
    window: int | None,
) -> Tensor:
    """One token of each row: (R, H, E). Grouped query heads are folded into the query length."""
    rows, heads, features = query_rhe.shape
    kv_heads, device = keys_ske.shape[1], query_rhe.device
    longest = max(span.used for span in group)
    what = (group[0].first, window)
    if what not in made:
        start_r1 = torch.tensor([[span.start] for span in group], device=device)
        used_r1 = torch.tensor([[span.used] for span in group], device=device)
        at_l = torch.arange(longest, device=device)
        seen_rl = at_l < used_r1
        index_rl = (start_r1 + at_l).masked_fill(~seen_rl, 0)  # the cache may end before
        if window is not None:
            seen_rl = seen_rl & (at_l >= used_r1 - window)
        mask_rl = torch.zeros(rows, longest, dtype=query_rhe.dtype, device=device)
        made[what] = index_rl.flatten(), mask_rl.masked_fill_(~seen_rl, -torch.inf)[:, None, None]
    index, mask_r11l = made[what]
    key_rkle, value_rkle = (
        pool.index_select(0, index).view(rows, longest, kv_heads, -1).transpose(1, 2)
        for pool in (keys_ske, values_ske)
    )
    folded = query_rhe.reshape(rows, kv_heads, heads // kv_heads, features)
    out = F.scaled_dot_product_attention(
        folded, key_rkle, value_rkle, attn_mask=mask_r11l, scale=scale
    )
    return out.reshape(rows, heads, -1)


def _piece(
    query_nhe: Tensor,
    keys_ske: Tensor,
    values_ske: Tensor,
    span: Span,
    made: dict[Any, Any],
    scale: float,
    window: int | None,
) -> Tensor:
    """Several tokens of one row: (N, H, E)."""
    region = slice(span.start, span.start + span.used)
    key_kle, value_kle = (pool[region].transpose(0, 1) for pool in (keys_ske, values_ske))
    is_whole = span.new == span.used and (window is None or window >= span.used)
    what = (span.first, window)
    if not is_whole and what not in made:
        at_n1 = torch.arange(span.used - span.new, span.used, device=query_nhe.device)[:, None]
        at_l = torch.arange(span.used, device=query_nhe.device)
        seen = at_l <= at_n1
        made[what] = seen if window is None else seen & (at_n1 - at_l < window)
    out_1hne = F.scaled_dot_product_attention(
        query_nhe.transpose(0, 1)[None],
        key_kle[None],
        value_kle[None],
        attn_mask=None if is_whole else made[what],
        is_causal=is_whole,
        scale=scale,
        enable_gqa=query_nhe.shape[1] != keys_ske.shape[1],
    )
    return out_1hne[0].transpose(0, 1)
