"""Tokens drawn from logits: by temperature, top-k and top-p, each row by its own numbers.

The token is the inverse of the cumulated distribution, in the order of ids, at one uniform number
that the caller has drawn. Chances are whole numbers: exp((x - max) / temperature) in units of
2^-40, what is less being dropped. Sums of whole numbers are the same in whatever order they are
made, so a row's token depends on its logits and its numbers alone, and not on how many rows are
drawn with it, where it lies among them, or how a GPU shares out the work. (Of floating-point sums
PyTorch's order changes with the number of rows, and a seed's answers with it.) What is dropped is
less than 2^-22 of the whole, with the largest of vocabularies.

Top-k and top-p need no sorting either. Both leave the tokens from some logit upwards: the largest
for which those tokens are k, or have the share p of what top-k has left. It is found by bisection
over the order of floating-point numbers. Tokens that are exactly as likely as the last one that is
left are left too (bf16 logits have many such): nothing but their ids could tell them apart.

The kernel is in `kernels/draw_triton.py`; the definition is here, and runs on a CPU. It asks a GPU
for numbers at every row; `draw_by_sorting` asks for none, for a GPU on which the kernel is no use.

Shape legend: R rows, V tokens of the vocabulary, S rows that are drawn, C candidates, Q pieces of
P tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Draw = Callable[[Tensor, Tensor, Tensor], None]
"""As `draw`."""

UNIT = 2.0**-40
"""Of chances, the likeliest token's being 1: 2^22 such tokens have a sum below 2^63."""
COLUMNS = 5
"""Of `told_s5`."""
_TOGETHER = 2**22
"""Logits that are sorted together, in some 250 MB: 32 rows of a vocabulary of 128,256."""
_PIECE = 128
"""Chances that are added up before their sums are cumulated."""
_CANDIDATES = 1024
"""Likeliest tokens that are looked at first: sorting a whole vocabulary takes longer."""


def draw(logits_rv: Tensor, tokens_r: Tensor, told_s5: Tensor) -> None:
    """Replace the likeliest tokens (R,) int64 of some rows by drawn ones, in place.

    `told_s5` float64, on the host (pinned, where the others are a GPU's): the row, temperature
    (above 0), top-k (0: no limit), top-p and a number in [0, 1). A row whose token is below 0 has
    none, and stays. Nothing waits for a GPU.
    """
    if logits_rv.is_cuda:
        from tunefork.kernels.draw_triton import launch  # needs Triton, which comes with CUDA

        here_s5 = told_s5.to(logits_rv.device, non_blocking=True)
        launch(logits_rv, tokens_r, here_s5, COLUMNS, UNIT)
    else:
        draw_reference(logits_rv, tokens_r, told_s5)


def draw_reference(logits_rv: Tensor, tokens_r: Tensor, told_s5: Tensor) -> None:
    """The definition of `draw`."""
    for row, temperature, top_k, top_p, uniform in told_s5.tolist():
        best = int(tokens_r[int(row)])
        if best < 0:
            continue
        x_v = logits_rv[int(row)].float()
        chances_v = (((x_v - x_v[best]) * (1.0 / temperature)).exp() / UNIT).long()
        if 0 < top_k < len(x_v):
            chances_v[x_v < x_v.topk(int(top_k)).values[-1]] = 0
        if top_p < 1.0:
            chances_v[x_v < _least(x_v, chances_v, top_p)] = 0
        cumulated_v = chances_v.cumsum(0)
        whole = int(cumulated_v[-1])
        at = min(int(uniform * whole), whole - 1)
        tokens_r[int(row)] = torch.searchsorted(cumulated_v, at, right=True)


def _least(x_v: Tensor, chances_v: Tensor, top_p: float) -> Tensor:
    """The largest logit such that tokens from there on have the share `top_p` of all chances."""
    whole = int(chances_v.sum())
    wanted = max(min(int(top_p * whole), whole), 1)
    for count in (min(_CANDIDATES, len(x_v)), len(x_v)):
        top = x_v.topk(count)
        cumulated_c = chances_v[top.indices].cumsum(0)
        if int(cumulated_c[-1]) >= wanted:
            break
    return top.values[int(torch.searchsorted(cumulated_c, wanted))]


def draw_by_sorting(logits_rv: Tensor, tokens_r: Tensor, told_s5: Tensor) -> None:
    """As `draw`, in PyTorch's operations, none of which waits for a GPU: by count 1 to 2 ms for 64
    rows that are limited, half of one for others. Quickest where limited ones are the last."""
    here_s5 = told_s5.to(logits_rv.device, non_blocking=True)
    limited_s = ((told_s5[:, 2] > 0) | (told_s5[:, 3] < 1.0)).tolist()
    together = max(1, _TOGETHER // logits_rv.shape[1])
    first = limited_s.index(True) if True in limited_s else len(limited_s)
    for rows_s5, is_limited in ((here_s5[:first], False), (here_s5[first:], True)):
        for part_s5 in torch.split(rows_s5, together) if len(rows_s5) else ():
            _draw_together(logits_rv, tokens_r, part_s5, is_limited=is_limited)


def _draw_together(
    logits_rv: Tensor, tokens_r: Tensor, told_s5: Tensor, *, is_limited: bool
) -> None:
    row_s = told_s5[:, 0].long()
    temperature_s1, top_k_s1, top_p_s1, uniform_s1 = torch.split(told_s5[:, 1:], 1, dim=1)
    best_s1, x_sv = tokens_r[row_s, None], logits_rv[row_s].float()
    highest_s1, width = x_sv.gather(1, best_s1.clamp_min(0)), x_sv.shape[1]
    chances_sv = (((x_sv - highest_s1) * (1.0 / temperature_s1).float()).exp() / UNIT).long()
    if is_limited:
        ordered_sv, order_sv = x_sv.sort(dim=1, descending=True)
        limit_s1 = torch.where(top_k_s1 > 0, top_k_s1, width).clamp_max(width).long()
        chances_sv[x_sv < ordered_sv.gather(1, limit_s1 - 1)] = 0
        pieces_sqp, cumulated_sq = _cumulated(chances_sv.gather(1, order_sv))
        whole_s1 = cumulated_sq[:, -1:]
        wanted_s1 = torch.where(top_p_s1 < 1.0, (top_p_s1 * whole_s1).long(), whole_s1)
        least_s1 = _first(pieces_sqp, cumulated_sq, wanted_s1.clamp_min(1)).clamp_max(width - 1)
        chances_sv[x_sv < ordered_sv.gather(1, least_s1)] = 0
    pieces_sqp, cumulated_sq = _cumulated(chances_sv)
    whole_s1 = cumulated_sq[:, -1:]
    at_s1 = torch.minimum((uniform_s1 * whole_s1).long(), whole_s1 - 1)
    drawn_s1 = _first(pieces_sqp, cumulated_sq, at_s1 + 1).clamp_max(width - 1)
    tokens_r[row_s] = torch.where(best_s1 < 0, best_s1, drawn_s1)[:, 0]


def _cumulated(chances_sv: Tensor) -> tuple[Tensor, Tensor]:
    """(S, Q, P) chances in pieces, and (S, Q) the sum up to each piece's end.

    A GPU cumulates a row in one block: 128,256 chances would take it a tenth of a millisecond or
    more, while all others wait. By pieces there are a thousand sums.
    """
    filling = -chances_sv.shape[1] % _PIECE
    if filling:
        chances_sv = F.pad(chances_sv, (0, filling))
    pieces_sqp = chances_sv.view(len(chances_sv), -1, _PIECE)
    return pieces_sqp, pieces_sqp.sum(2).cumsum(1)


def _first(pieces_sqp: Tensor, cumulated_sq: Tensor, wanted_s1: Tensor) -> Tensor:
    """(S, 1) the first column up to which the chances (`_cumulated`) are `wanted` or more."""
    piece_s1 = torch.searchsorted(cumulated_sq, wanted_s1).clamp_max(cumulated_sq.shape[1] - 1)
    own_s1p = pieces_sqp.gather(1, piece_s1[:, :, None].expand(-1, -1, _PIECE))
    own_sp = own_s1p[:, 0].cumsum(1)
    before_s1 = cumulated_sq.gather(1, piece_s1) - own_sp[:, -1:]
    at_s1 = torch.searchsorted(own_sp, wanted_s1 - before_s1).clamp_max(_PIECE - 1)
    return piece_s1 * _PIECE + at_s1
