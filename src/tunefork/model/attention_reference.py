"""Causal attention within segments by its definition, and its gradient: what kernels are held to.

Shape legend: N tokens of all segments, H query heads, K key-value heads, E features of a head.
"""

import torch
from torch import Tensor


def reference(
    q_nhe: Tensor,
    k_nke: Tensor,
    v_nke: Tensor,
    starts: Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """The definition, (N, H, E): a token sees those of its segment up to itself, and of these the
    last `window` ones. `longest` is only asked of kernels."""
    del longest
    return with_sums(q_nhe, k_nke, v_nke, starts, scale=scale, window=window)[0]


def with_sums(
    q_nhe: Tensor,
    k_nke: Tensor,
    v_nke: Tensor,
    starts: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference`, and the log of each softmax's sum, (H, N), in at least fp32."""
    scores_hnn = _scores(q_nhe, k_nke, starts, scale, window)
    out_nhe = torch.einsum("hqk,khe->qhe", scores_hnn.softmax(-1), _for_each_head(v_nke, q_nhe))
    return out_nhe, _wide(scores_hnn).logsumexp(-1)


def gradients(
    dout_nhe: Tensor,
    q_nhe: Tensor,
    k_nke: Tensor,
    v_nke: Tensor,
    out_nhe: Tensor,
    sums_hn: Tensor,
    starts: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, k and v from what `with_sums` made (Dao 2023, https://arxiv.org/abs/2307.08691,
    algorithm 2, in one block)."""
    scores_hnn = _scores(q_nhe, k_nke, starts, scale, window)
    weights_hnn = (scores_hnn - sums_hn[..., None]).exp().to(q_nhe.dtype)
    dweights_hnn = torch.einsum("qhe,khe->hqk", dout_nhe, _for_each_head(v_nke, q_nhe))
    inner_hn = (_wide(dout_nhe) * out_nhe).sum(-1).T
    dscores_hnn = (weights_hnn * (dweights_hnn - inner_hn[..., None]) * scale).to(q_nhe.dtype)
    dq_nhe = torch.einsum("hqk,khe->qhe", dscores_hnn, _for_each_head(k_nke, q_nhe))
    dk_nhe = torch.einsum("hqk,qhe->khe", dscores_hnn, q_nhe)
    dv_nhe = torch.einsum("hqk,qhe->khe", weights_hnn, dout_nhe)
    tokens, groups, features = k_nke.shape
    dk_nke, dv_nke = (x.view(tokens, groups, -1, features).sum(2) for x in (dk_nhe, dv_nhe))
    return dq_nhe, dk_nke, dv_nke


def _scores(
    q_nhe: Tensor, k_nke: Tensor, starts: Tensor, scale: float, window: int | None
) -> Tensor:
    scores_hnn = torch.einsum("qhe,khe->hqk", q_nhe, _for_each_head(k_nke, q_nhe)) * scale
    return scores_hnn.masked_fill(~sees(starts, q_nhe.shape[0], window), -torch.inf)


def _wide(x: Tensor) -> Tensor:
    """In at least fp32, as kernels keep their sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _for_each_head(x_nke: Tensor, q_nhe: Tensor) -> Tensor:
    return x_nke.repeat_interleave(q_nhe.shape[1] // x_nke.shape[1], dim=1)


def sees(starts: Tensor, tokens: int, window: int | None = None) -> Tensor:
    """The mask that segments stand for: (N, N) boolean, query by key."""
    at = torch.arange(tokens, device=starts.device)
    segment = torch.bucketize(at, starts[1:], right=True)
    distance = at[:, None] - at
    seen = (segment[:, None] == segment) & (distance >= 0)
    return seen if window is None else seen & (distance < window)
