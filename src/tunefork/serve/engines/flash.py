"""Serving's attention by PyTorch's FlashAttention 2: a GPU in bf16 or fp16.

A segment of keys begins anywhere in the cache and is as long as `used` says, so nothing is copied.

The kernel has a program for each row, query head and 128 tokens. For a row of one token that is a
program for each query head, which reads keys and values anew for one token. So many rows of one
token are given to it with the query heads of a key-value head in place of tokens: a quarter of the
programs for Llama 3's 8B, and of what they read. In a pass with prompts, where tokens must see what
is before them alone, such rows have a call of their own.

Shape legend as in `attention.py`.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tunefork.serve.engines.reads import Decoding, Reads, Span
from tunefork.serve.engines.sdpa import sdpa


def flash(
    query_nhe: Tensor,
    keys_ske: Tensor,
    values_ske: Tensor,
    reads: Reads,
    scale: float,
    window: int | None,
) -> Tensor:
    """(N, H, E). CUDA, bf16 or fp16; no number is read off the GPU.

    A row's last token sees all that is used, those before it one less each. Tokens of a row that
    uses none get zeros.
    """
    groups = query_nhe.shape[1] // keys_ske.shape[1]
    cache = (keys_ske, values_ske, reads.longest_k, scale, window)
    if window is not None or groups not in reads.grouped:
        longest_q = len(query_nhe) if reads.longest_q is None else reads.longest_q
        rows = [reads.starts_q, reads.starts_k, reads.used_r]
        return _read(query_nhe, rows, longest_q, cache, is_causal=longest_q > 1)
    starts_g, decoding = reads.grouped[groups], reads.decoding
    if decoding is None:
        return _grouped(query_nhe, [starts_g, reads.starts_k, reads.used_r], groups, cache)
    rows = [decoding.starts_rest, reads.starts_k, reads.used_r]
    found_nhe = _read(query_nhe, rows, len(query_nhe), cache, is_causal=True)
    many = len(decoding.used_m)
    rows = [starts_g, reads.starts_k[: many + 1], decoding.used_m]
    first_mhe = _grouped(query_nhe[:many], rows, groups, cache)
    # What the first call leaves of rows that had no tokens in it is anything, also no number.
    is_decoding_m11 = (decoding.used_m > 0)[:, None, None]
    found_nhe[:many] = torch.where(is_decoding_m11, first_mhe, found_nhe[:many])
    return found_nhe


_Cache = tuple[Tensor, Tensor, int, float, int | None]
"""Keys, values, the longest region, scale and window: the same for all calls of a layer."""


def _read(
    query_nhe: Tensor, rows: list[Tensor], longest_q: int, cache: _Cache, *, is_causal: bool
) -> Tensor:
    """The kernel. `rows`: where their tokens begin, their regions do, and what they use of them."""
    run = flash_in_a_graph if torch.compiler.is_compiling() else _kernel
    keys_ske, values_ske, longest_k, scale, window = cache
    told = (rows, longest_q, longest_k, is_causal, scale, window)
    return run(query_nhe, keys_ske, values_ske, *told)


def _grouped(query_nhe: Tensor, rows: list[Tensor], groups: int, cache: _Cache) -> Tensor:
    """Of rows of one token: as many tokens as query heads share a key-value head.

    All of them see everything. The kernel would do it too, by three copies in place of two that are
    fused with others.
    """
    tokens, heads, features = query_nhe.shape
    kv_heads = heads // groups
    query_nhe = query_nhe.view(tokens, kv_heads, groups, features).transpose(1, 2)
    query_nhe = query_nhe.reshape(tokens * groups, kv_heads, features)
    found = _read(query_nhe, rows, groups, cache, is_causal=False)
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


def flash_agrees(
    heads: int,
    kv_heads: int,
    features: int,
    dtype: torch.dtype,
    *,
    apart: bool = False,
    device: str = "cuda",
) -> bool:
    """Whether `flash` is what `sdpa` is on this GPU, for decoding rows and for pieces of prompts;
    or, `apart`, for prompts with rows that decode before them, read by themselves.

    Regions lie apart and in no order here, with something else around them. Behind the prompts are
    a row that sees nothing and one without tokens, which fill captured passes up. Raises what the
    kernel raises where this GPU or this PyTorch has it not.
    """
    random, groups = torch.Generator(device).manual_seed(0), heads // kv_heads

    def draw(tokens: int, number: int) -> Tensor:
        shape = (tokens, number, features)
        return torch.randn(shape, generator=random, device=device).to(dtype)

    def numbers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    keys_ske, values_ske = draw(512, kv_heads), draw(512, kv_heads)
    for new in ((1, 1, 40, 70, 0),) if apart else ((1, 1, 1), (1, 5, 40, 70, 0)):
        first = [sum(new[:at]) for at in range(len(new) + 1)]
        told = list(zip(first, new, (300, 64, 129, 0, 0), (77, 33, 170, 0, 0), strict=False))
        spans = tuple(Span(at, number, start, used) for at, number, start, used in told[:3])
        starts_q, starts_k = numbers(first), numbers([*(start for _, _, start, _ in told), 0])
        used_r = numbers([used for _, _, _, used in told])
        write_n = torch.zeros(0, dtype=torch.int64, device=device)
        reads = Reads(write_n, starts_q, starts_k, used_r, max(new), 256, spans)
        ways = [reads]
        if max(new) == 1:
            ways.append(replace(reads, grouped={groups: starts_q * groups}))
        if apart:  # four rows might decode, and two do
            starts_g = numbers([*range(5)]) * groups
            alone = Decoding(numbers([77, 33, 0, 0]), starts_q.clamp(min=2))
            ways = [replace(reads, grouped={groups: starts_g}, decoding=alone)]
        query_nhe = draw(sum(new), heads)
        for window in (None, 16):
            how = (features**-0.5, window)
            wanted = sdpa(query_nhe, keys_ske, values_ske, reads, *how).float()
            for way in ways:
                found = flash(query_nhe, keys_ske, values_ske, way, *how)
                if not torch.allclose(found.float(), wanted, atol=0.03):
                    return False
    return True
