"""The next token of each row, by its request's own sampling parameters.

A sampled token is the inverse of the cumulated distribution at one uniform number. The numbers come
from a generator that belongs to the request, one a token, so what else is in the batch changes
nothing but the rounding of logits. In this order, as OpenAI's API and vLLM have it: bias and
penalties, grammar, temperature, top-k, top-p. The log probabilities that are told are those of the
model's own logits, before all of that.

Shape legend: R rows, V tokens of the vocabulary, C candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BAD = -1
"""In place of a token where a row's logits are not finite."""
_CANDIDATES = 1024
"""Likeliest tokens that top-k and top-p look at first: sorting a whole vocabulary takes longer."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How one row's token is chosen."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    uniform: float = 0.0
    """In [0, 1): where in the cumulated distribution."""
    changes: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit): penalties and bias."""
    allowed: Tensor | None = None
    """(V,) boolean on the CPU: what the grammar lets through."""

    @property
    def is_greedy(self) -> bool:
        """The likeliest token of the logits as they are."""
        return self.temperature == 0.0 and not self.changes and self.allowed is None


def greedy(logits_rv: Tensor) -> Tensor:
    """(R,) int64: the likeliest token of each row, or BAD."""
    best = logits_rv.max(dim=-1)
    return torch.where(best.values.isfinite(), best.indices, BAD)


def choose(logits_rv: Tensor, choices: Sequence[Choice]) -> Tensor:
    """(R,) int64 on the logits' device: a token of each row, or BAD."""
    tokens_r = greedy(logits_rv)
    rows = [row for row, choice in enumerate(choices) if not choice.is_greedy]
    if not rows:
        return tokens_r
    ours = [choices[row] for row in rows]
    device = logits_rv.device
    row_index = torch.tensor(rows, device=device)
    scores_rv = logits_rv.index_select(0, row_index).float()
    was_finite = tokens_r.index_select(0, row_index) != BAD
    _change(scores_rv, ours)
    found = scores_rv.argmax(-1)
    hot = [at for at, choice in enumerate(ours) if choice.temperature > 0.0]
    if hot:
        hot_index = torch.tensor(hot, device=device)
        picked = _sample(scores_rv.index_select(0, hot_index), [ours[at] for at in hot])
        found.index_copy_(0, hot_index, picked)
    return tokens_r.index_copy(0, row_index, torch.where(was_finite, found, BAD))


def _change(scores_rv: Tensor, choices: Sequence[Choice]) -> None:
    """Add bias and penalties, and rule out what a grammar does not allow, in place."""
    listed = [
        (row, token, by) for row, choice in enumerate(choices) for token, by in choice.changes
    ]
    if listed:
        rows, tokens, by = zip(*listed, strict=True)
        device = scores_rv.device
        where = (torch.tensor(rows, device=device), torch.tensor(tokens, device=device))
        scores_rv.index_put_(where, torch.tensor(by, device=device), accumulate=True)
    for row, choice in enumerate(choices):
        if choice.allowed is not None:
            scores_rv[row].masked_fill_(~choice.allowed.to(scores_rv.device), -torch.inf)


def _sample(scores_rv: Tensor, choices: Sequence[Choice]) -> Tensor:
    """(R,) tokens drawn of rows whose temperature is above 0."""
    device, width = scores_rv.device, scores_rv.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    scores_rv = scores_rv / column([max(choice.temperature, 1e-4) for choice in choices])
    uniform_r1 = column([choice.uniform for choice in choices])
    limits = [min(choice.top_k or width, width) for choice in choices]
    filtered = [
        row for row, choice in enumerate(choices) if limits[row] < width or choice.top_p < 1.0
    ]
    tokens_r = _invert(scores_rv.softmax(-1), uniform_r1)
    if not filtered:
        return tokens_r
    index = torch.tensor(filtered, device=device)
    tokens_r.index_copy_(
        0,
        index,
        _filtered(
            scores_rv.index_select(0, index),
            torch.tensor([limits[row] for row in filtered], device=device)[:, None],
            column([choices[row].top_p for row in filtered]),
            uniform_r1.index_select(0, index),
        ),
    )
    return tokens_r


def _filtered(scores_rv: Tensor, limit_r1: Tensor, top_p_r1: Tensor, uniform_r1: Tensor) -> Tensor:
    """(R,) tokens drawn among the likeliest: the fewest that have `top_p`, and at most `limit`."""
    width = scores_rv.shape[1]
    total_r1 = scores_rv.logsumexp(-1, keepdim=True)
    top = scores_rv.topk(min(_CANDIDATES, width), dim=-1)
    chances_rc, tokens_rc = (top.values - total_r1).exp(), top.indices
    # Top-k comes first, and top-p is of what it left.
    short = (chances_rc.sum(-1, keepdim=True) < top_p_r1) & (limit_r1 > top.values.shape[1])
    short |= (limit_r1 > top.values.shape[1]) & (limit_r1 < width)
    found_r = _pick(chances_rc, tokens_rc, limit_r1, top_p_r1, uniform_r1)
    rows = short[:, 0].nonzero()[:, 0].tolist() if top.values.shape[1] < width else []
    for row in rows:  # a flat distribution: rare
        order = scores_rv[row : row + 1].sort(dim=-1, descending=True, stable=True)
        chances = (order.values - total_r1[row]).exp()
        args = (limit_r1[row : row + 1], top_p_r1[row : row + 1], uniform_r1[row : row + 1])
        found_r[row] = _pick(chances, order.indices, *args)[0]
    return found_r


def _pick(
    chances_rc: Tensor, tokens_rc: Tensor, limit_r1: Tensor, top_p_r1: Tensor, uniform_r1: Tensor
) -> Tensor:
    """`chances_rc` are of the whole vocabulary, largest first."""
    rank = torch.arange(chances_rc.shape[1], device=chances_rc.device)
    kept_rc = chances_rc.masked_fill(rank >= limit_r1, 0.0)
    within = kept_rc.sum(-1, keepdim=True).where(limit_r1 <= rank.numel(), 1.0)
    before_rc = kept_rc.cumsum(-1) - kept_rc
    kept_rc = kept_rc.masked_fill(before_rc >= top_p_r1 * within, 0.0)
    at = _invert(kept_rc, uniform_r1)
    return tokens_rc.gather(1, at[:, None])[:, 0]


def _invert(chances_rv: Tensor, uniform_r1: Tensor) -> Tensor:
    """(R,) the first index whose cumulated chance is above `uniform` of their sum."""
    cumulated = chances_rv.cumsum(-1)
    wanted = uniform_r1 * cumulated[:, -1:]
    at = torch.searchsorted(cumulated, wanted, right=True)
    last = chances_rv.shape[1] - 1
    # Rounding may end past the last chance that is not zero.
    highest = (last - (chances_rv > 0).flip(-1).int().argmax(-1, keepdim=True)).clamp(max=last)
    return torch.minimum(at, highest)[:, 0]


def log_probabilities(
    logits_rv: Tensor, tokens: Sequence[int], num_top: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Of each row: ln p of its token, and the `num_top` likeliest (token, ln p)."""
    scores_rv = logits_rv.float()
    total_r1 = scores_rv.logsumexp(-1, keepdim=True)
    index = torch.tensor(list(tokens), device=scores_rv.device)[:, None]
    own = (scores_rv.gather(1, index) - total_r1)[:, 0].tolist()
    top = scores_rv.topk(max(num_top, 1), dim=-1)
    values, ids = (top.values - total_r1).tolist(), top.indices.tolist()
    return [
        (value, list(zip(row_ids[:num_top], row_values[:num_top], strict=True)))
        for value, row_ids, row_values in zip(own, ids, values, strict=True)
    ]
