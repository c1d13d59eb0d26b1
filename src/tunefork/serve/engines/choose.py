"""The next token of each row, by its request's own sampling parameters.

A sampled token is the inverse of the cumulated distribution at one uniform number
(`kernels/draw.py`). The numbers come from a generator that belongs to the request, one a token, so
what else is in the batch changes nothing but the rounding of logits. In this order, as OpenAI's API
and vLLM have it: bias and penalties, grammar, temperature, top-k, top-p. The log probabilities that
are told are those of the model's own logits, before all of that.

What needs nothing but logits and that number is drawn behind the pass, in its stream (`draw_rows`),
whether or not the next pass is launched before the host has seen the token: it is the same call
either way, and a row's token does not depend on the other rows, so of the same logits a seed's
token is the same.
What changes logits (bias, penalties, a grammar) is known to the host alone, when it has seen the
tokens before (`choose`).

Shape legend: R rows, V tokens of the vocabulary, S rows that are drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunefork.kernels.draw import COLUMNS, Draw, draw

BAD = -1
"""In place of a token where a row's logits are not finite."""
_COLDEST = 1e-4
"""Temperatures between 0 and this are this."""


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
    def is_drawn(self) -> bool:
        """By chance. With a top-k of 1 there is nothing to choose from."""
        return self.temperature > 0.0 and self.top_k != 1

    @property
    def is_greedy(self) -> bool:
        """The likeliest token of the logits as they are."""
        return not self.is_drawn and not self.changes and self.allowed is None


def greedy(logits_rv: Tensor) -> Tensor:
    """(R,) int64: the likeliest token of each row, or BAD."""
    best = logits_rv.max(dim=-1)
    return torch.where(best.values.isfinite(), best.indices, BAD)


def draw_rows(
    logits_rv: Tensor, tokens_r: Tensor, choices: Mapping[int, Choice], by: Draw = draw
) -> None:
    """Replace the likeliest tokens (`greedy`) of the rows in `choices` by drawn ones, in place.

    Of a choice, changes and grammar are in the logits by now. Nothing waits for a GPU.
    """
    if not choices:
        return
    told = [
        (row, max(one.temperature, _COLDEST), one.top_k, one.top_p, one.uniform)
        for row, one in choices.items()
    ]
    told.sort(key=lambda one: one[2] > 0 or one[3] < 1.0)  # those that are limited last, together
    is_cuda = logits_rv.is_cuda
    told_s5 = torch.tensor(told, dtype=torch.float64, pin_memory=is_cuda).view(-1, COLUMNS)
    by(logits_rv, tokens_r, told_s5)


def choose(logits_rv: Tensor, choices: Sequence[Choice], by: Draw = draw) -> Tensor:
    """(R,) int64 on the logits' device: a token of each row, or BAD."""
    tokens_r = greedy(logits_rv)
    rows = [row for row, choice in enumerate(choices) if not choice.is_greedy]
    if not rows:
        return tokens_r
    ours = [choices[row] for row in rows]
    row_index = torch.tensor(rows, device=logits_rv.device)
    scores_rv = logits_rv.index_select(0, row_index).float()
    was_finite = tokens_r.index_select(0, row_index) != BAD
    _change(scores_rv, ours)
    found = greedy(scores_rv)
    draw_rows(scores_rv, found, {at: one for at, one in enumerate(ours) if one.is_drawn}, by)
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
