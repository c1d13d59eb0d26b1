"""AdamW over many adapters at once, each with a learning rate, step count and clipping of its own.

The parameters lie in one flat fp32 tensor, cut into blocks that are one slot's each (a power of two
of elements); a block's slot picks its row of factors. One pass reads p, g, m, v and writes p, m, v
and g = 0, 32 bytes a parameter, however many adapters there are (AdamW: Loshchilov and Hutter,
https://arxiv.org/abs/1711.05101, algorithm 2). Slots that are not due keep every bit of p, m and v:
they are chosen by `where`, as a product with zero would let a NaN through.

On a GPU torch.compile makes one kernel of it. A CPU, where a call costs little, takes PyTorch's
fused AdamW slot by slot (`update_slot_`): the very arithmetic of a run alone. `adamw_slots_` runs
there too, by pieces that stay in its cache; the two are tested against each other.

Shape legend: b = blocks, n = elements of a block, G slots.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tunefork.kernels.compiled import compiled_on_cuda

_PIECE = {"cpu": 2**17, "cuda": 2**30}
"""Most elements of one call: of a CPU's cache, and of what an int32 can number."""

FACTORS = 8
"""decay, rate, gradient scale, 1 - beta1, 1 - beta2, second moment's scale, eps (those of
`kernels.adamw.factors_of`), and whether the slot is due."""


@torch.no_grad()
def adamw_slots_(
    p_bn: Tensor, g_bn: Tensor, m_bn: Tensor, v_bn: Tensor, slot_b: Tensor, factors_gf: Tensor
) -> None:
    """Update p, m and v of the slots that are due, in place, and put all of g to zero."""
    for part in _pieces(p_bn):
        _update_(p_bn[part], g_bn[part], m_bn[part], v_bn[part], slot_b[part], factors_gf)


def _pieces(flat_bn: Tensor) -> Iterator[slice]:
    blocks = max(1, _PIECE["cuda" if flat_bn.is_cuda else "cpu"] // flat_bn.shape[1])
    for first in range(0, len(flat_bn), blocks):
        yield slice(first, first + blocks)


@compiled_on_cuda(dynamic=False)
def _update_(
    p_bn: Tensor, g_bn: Tensor, m_bn: Tensor, v_bn: Tensor, slot_b: Tensor, factors_gf: Tensor
) -> None:
    factors = factors_gf[slot_b]
    decay, rate, g_scale, new_m, new_v, v_scale, eps, due = factors[:, :, None].unbind(1)
    g = g_bn * g_scale
    m = torch.lerp(m_bn, g, new_m)
    v = torch.lerp(v_bn, g * g, new_v)
    p = p_bn * decay - rate * m / (v.sqrt() * v_scale + eps)
    is_due = due > 0
    p_bn.copy_(torch.where(is_due, p, p_bn))
    m_bn.copy_(torch.where(is_due, m, m_bn))
    v_bn.copy_(torch.where(is_due, v, v_bn))
    g_bn.zero_()


@torch.no_grad()
def update_slot_(
    parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    count: Tensor,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    gradient_scale: float,
) -> None:
    """The update number `count` (from 1, fp32) of one slot, whose p, g, m and v are `parts`."""
    p, g, m, v = (list(tensors) for tensors in zip(*parts, strict=True))
    torch._fused_adamw_(
        p,
        g,
        m,
        v,
        [],
        [count] * len(p),
        lr=learning_rate,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
        grad_scale=None if gradient_scale == 1.0 else torch.tensor(1.0 / gradient_scale),
    )


@compiled_on_cuda(dynamic=False)
def _squares(g_bn: Tensor) -> Tensor:
    """(b,) fp32: each block's sum of squares."""
    return (g_bn * g_bn).sum(1)


@torch.no_grad()
def slot_norms(g_bn: Tensor, at_gk: Tensor) -> Tensor:
    """Each slot's L2 norm: (G,) fp32. `at_gk` are its blocks' numbers, filled up by b.

    Gathered, not added up in turn: the same each time, and a NaN stays with its slot. The sums over
    blocks are fp64, so that no bit hangs on how many places are filling.
    """
    squares = [_squares(g_bn[part]) for part in _pieces(g_bn)]
    squares_b = torch.cat([*squares, squares[0].new_zeros(1)])
    own_gk = squares_b.index_select(0, at_gk.flatten()).view(at_gk.shape)
    return own_gk.sum(1, dtype=torch.float64).sqrt().float()
