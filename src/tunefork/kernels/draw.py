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

The kernel is in `kernels/draw_triton.py`; the definition is here, and runs on a CPU.

Shape legend: R rows, V tokens of the vocabulary, S rows that are drawn, C candidates.
"""

import torch
from torch import Tensor

UNIT = 2.0**-40
"""Of chances, the likeliest token's being 1: 2^22 such tokens have a sum below 2^63."""
COLUMNS = 5
"""Of `told_s5`."""
_CANDIDATES = 1024
"""Likeliest tokens that are looked at first: sorting a whole vocabulary takes longer."""


def draw(logits_rv: Tensor, tokens_r: Tensor, told_s5: Tensor) -> None:
    """Replace the likeliest tokens (R,) int64 of some rows by drawn ones, in place.

    `told_s5` float64: the row, temperature (above 0), top-k (0: no limit), top-p and a number in
    [0, 1). A row whose token is below 0 has none, and stays. Nothing waits for a GPU.
    """
    if logits_rv.is_cuda:
        from tunefork.kernels.draw_triton import launch  # needs Triton, which comes with CUDA

        launch(logits_rv, tokens_r, told_s5, COLUMNS, UNIT)
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
