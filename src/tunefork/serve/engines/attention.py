"""Attention of one pass over many requests: each token sees its own request's keys and values.

A pass is one row of tokens, those of a request side by side: one token of each request that
decodes, then pieces of prompts. Keys and values of the new tokens are written to the cache, and two
ways read them:

    flash    a GPU in bf16 or fp16: PyTorch's FlashAttention 2 over segments of various lengths. One
             begins anywhere in the cache and is as long as `used` says, so nothing is copied
    sdpa     everything else, and the definition: PyTorch's SDPA, decoding rows of similar length
             at once, and each piece of a prompt by itself

The function is transformers' attention interface, so that models stay transformers' own. What a
model asks of attention beyond a scale and a sliding window is refused when the engine starts
(`cache.py`).

Shape legend: N tokens of the pass, R rows (requests), S tokens of the cache, H query heads,
K key-value heads, E features of a head, L longest row of a group.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "tunefork_serving"
"""The `attn_implementation` of a model that is served."""


@dataclass(frozen=True, slots=True)
class Span:
    """A request's part of a pass, on the host."""

    first: int
    """Where its new tokens begin in the pass."""
    new: int
    """How many they are."""
    start: int
    """Where its region begins in the cache."""
    used: int
    """Tokens in its region, the new ones with them."""


@dataclass(slots=True)
class Reads:
    """Where a pass's keys and values lie."""

    write_n: Tensor
    """Where in the cache each new token goes, int64."""
    starts_q: Tensor
    """(R + 1,) int32, where each row's tokens begin in the pass."""
    starts_k: Tensor
    """(R + 1,) int32, where each row's region begins; the last is not read."""
    used_r: Tensor
    """(R,) int32, how many tokens of its region each row sees."""
    longest_q: int
    longest_k: int
    spans: tuple[Span, ...] | None = None
    """For `sdpa`; None: `flash`."""
    grouped: dict[int, Tensor] = field(default_factory=dict)
    """Of rows of one token, where `flash` is to group heads: `starts_q` times so many query heads
    of one key-value head."""
    made: dict[Any, Any] = field(default_factory=dict)
    """What layers share: masks, and where to gather from."""


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


def flash(
    query_nhe: Tensor,
    keys_ske: Tensor,
    values_ske: Tensor,
    reads: Reads,
    scale: float,
    window: int | None,
) -> Tensor:
    """(N, H, E). CUDA, bf16 or fp16; no number is read off the GPU.

    A row's last token sees all that is used, those before it one less each.
    """
    run = flash_in_a_graph if torch.compiler.is_compiling() else _kernel
    tokens, heads, features = query_nhe.shape
    kv_heads, longest_q, starts_q = keys_ske.shape[1], reads.longest_q, reads.starts_q
    groups, is_causal = heads // kv_heads, longest_q > 1
    is_grouped = window is None and groups in reads.grouped
    if is_grouped:
        # As many tokens as query heads share a key-value head; all of them see everything. The
        # kernel would do it too, by three copies in place of two that are fused with others.
        longest_q, starts_q = groups, reads.grouped[groups]
        query_nhe = query_nhe.view(tokens, kv_heads, groups, features).transpose(1, 2)
        query_nhe = query_nhe.reshape(tokens * groups, kv_heads, features)
    rows = [starts_q, reads.starts_k, reads.used_r]
    told = (rows, longest_q, reads.longest_k, is_causal, scale, window)
    found = run(query_nhe, keys_ske, values_ske, *told)
    if is_grouped:
        found = found.view(tokens, groups, kv_heads, features).transpose(1, 2)
    return found.reshape(tokens, heads, features)


def _kernel(
    query_nhe: Tensor,
    keys_ske: Tensor,
    values_ske: Tensor,
    rows: list[Tensor],
    longest_q: int,
    longest_k: int,
    is_causal: bool,
    scale: float,
    window: int | None,
) -> Tensor:
    """The operator, and not `torch.nn.attention.varlen`: see `model/packed_attention.py`."""
    starts_q, starts_k, used_r = rows
    found: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
        query_nhe,
        keys_ske,
        values_ske,
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        0.0,
        is_causal,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        seqused_k=used_r,
    )
    return found[0]


@torch.library.custom_op("tunefork::serving_flash", mutates_args=())
def flash_in_a_graph(
    query_nhe: Tensor,
    keys_ske: Tensor,
    values_ske: Tensor,
    rows: list[Tensor],
    longest_q: int,
    longest_k: int,
    is_causal: bool,
    scale: float,
    window: int | None,
) -> Tensor:
    """The kernel as a compiler sees it: an operator with one result, contiguous, of q's shape."""
    told = (rows, longest_q, longest_k, is_causal, scale, window)
    return _kernel(query_nhe, keys_ske, values_ske, *told).contiguous()


@flash_in_a_graph.register_fake
def _(query_nhe: Tensor, *_: Any) -> Tensor:
    return query_nhe.new_empty(query_nhe.shape)


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


def flash_agrees(heads: int, kv_heads: int, features: int, dtype: torch.dtype) -> bool:
    """Whether `flash` is what `sdpa` is on this GPU, for decoding rows and for pieces of prompts.

    Regions lie apart and in no order here, with something else around them.
    """
    device = torch.device("cuda")
    random = torch.Generator(device).manual_seed(0)

    def draw(tokens: int, number: int) -> Tensor:
        shape = (tokens, number, features)
        return torch.randn(shape, generator=random, device=device).to(dtype)

    keys_ske, values_ske = draw(512, kv_heads), draw(512, kv_heads)
    for new in ((1, 1, 1), (1, 5, 40)):
        first = [sum(new[:at]) for at in range(4)]
        spans = tuple(
            Span(at, number, start, used)
            for at, number, start, used in zip(
                first, new, (300, 64, 129), (77, 33, 170), strict=False
            )
        )

        def numbers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        starts_k = numbers([*(span.start for span in spans), 0])
        used_r = numbers([span.used for span in spans])
        write_n = torch.zeros(0, dtype=torch.int64, device=device)
        reads = Reads(write_n, numbers(first), starts_k, used_r, max(new), 256, spans)
        groups = heads // kv_heads
        grouped = replace(reads, grouped={groups: reads.starts_q * groups})
        query_nhe = draw(sum(new), heads)
        for window in (None, 16):
            told = (features**-0.5, window)
            wanted = sdpa(query_nhe, keys_ske, values_ske, reads, *told).float()
            for way in (reads, grouped) if max(new) == 1 else (reads,):
                try:
                    found = flash(query_nhe, keys_ske, values_ske, way, *told)
                except (RuntimeError, TypeError):  # this GPU or this PyTorch has it not
                    return False
                if not torch.allclose(found.float(), wanted, atol=0.03):
                    return False
    return True
