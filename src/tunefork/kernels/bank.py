"""Many LoRA adapters over one base in one pass, for training: tokens lie in segments by adapter.

What a bank adds to a frozen base's product is `scale_g * B_g A_g x` for the tokens of adapter g
(`reference.bank_linear`); the product itself is whatever form the base has. Two ways:

    add_segments   a loop over the segments, each with its own two small products, added in place:
                   a CPU, where a call costs little, and fp32
    grouped        one grouped GEMM down for all adapters (and for all layers that read this input),
                   one up for each layer, two of each for the gradients: a GPU in bf16. Segment ends
                   are a tensor, so a captured pass serves every division of its tokens. Segments of
                   one length are batched products instead, which need no setting up

No product reaches over a segment's end, and nothing is multiplied by zero to leave it out: an
adapter whose values are not finite spoils its own tokens alone. No scale is shared either.

Adapters of several ranks lie in one matrix: slot g has `ranks[g]` rows of A (Q, D) and as many of
B transposed (Q, O), in the order of slots. The grouped form pads them to the largest rank, made a
multiple of 16 (tensor cores' step, and TMA's 16-byte strides), as it rounds them to bf16; its
products over the padding are zeros beside a base that is 64 times as wide.

Shape legend: S tokens, D features in, O features out, G slots, Q rows of all slots, R rank (padded
where there is one R for all).
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunefork.kernels.bank_products import each, sums

_STEP = 16

Bounds = tuple[tuple[int, int], ...]
"""First and last token (exclusive) of each slot."""


def spans(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """First and last row (exclusive) of each slot among the Q."""
    ends = list(accumulate(ranks))
    return [(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]


class _AddSegments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_so: Tensor,
        x_sd: Tensor,
        rows_a_qd: Tensor,
        rows_b_qo: Tensor,
        ranks: tuple[int, ...],
        bounds: Bounds,
        scales: tuple[float, ...],
    ) -> Tensor:
        parts, saved = [], []
        for (first, last), (start, end), scale in zip(bounds, spans(ranks), scales, strict=True):
            if first == last or start == end:
                continue
            a, b = rows_a_qd[start:end].to(x_sd.dtype), rows_b_qo[start:end].to(x_sd.dtype)
            u = x_sd[first:last] @ a.t()
            y_so[first:last].addmm_(u, b, alpha=scale)
            parts.append((first, last, start, end, scale))
            saved += [a, b, u]
        ctx.mark_dirty(y_so)
        ctx.save_for_backward(x_sd, *saved)
        ctx.parts = parts
        ctx.rows = [(rows.shape, rows.dtype) for rows in (rows_a_qd, rows_b_qo)]
        return y_so

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_so: Tensor) -> tuple[Tensor | None, ...]:
        x_sd, *saved = ctx.saved_tensors
        has_x, has_rows = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        # Zero where a slot has no tokens or no rows here.
        tokens = sum(last - first for first, last, *_ in ctx.parts)
        rows = sum(end - start for _, _, start, end, _ in ctx.parts)
        new = torch.empty if rows == ctx.rows[0][0][0] else torch.zeros
        da_qd, db_qo = (new(shape, dtype=kind, device=x_sd.device) for shape, kind in ctx.rows)
        dx_sd = torch.empty_like(x_sd) if tokens == len(x_sd) else torch.zeros_like(x_sd)
        for at, (first, last, start, end, scale) in enumerate(ctx.parts):
            a, b, u = saved[3 * at : 3 * at + 3]
            dy = dy_so[first:last]
            du = (dy @ b.t()).mul_(scale)
            if has_rows:
                da_qd[start:end] = du.t() @ x_sd[first:last]
                db_qo[start:end] = (u * scale).t() @ dy
            if has_x:
                torch.mm(du, a, out=dx_sd[first:last])
        gradients = (da_qd, db_qo) if has_rows else (None, None)
        return dy_so, dx_sd if has_x else None, *gradients, None, None, None


def add_segments(
    y_so: Tensor,
    x_sd: Tensor,
    rows_a_qd: Tensor,
    rows_b_qo: Tensor,
    ranks: tuple[int, ...],
    bounds: Bounds,
    scales: tuple[float, ...],
) -> Tensor:
    """y += scale_g * B_g A_g x over each slot's tokens, in place; returns y.

    x (S, D) and y (S, O) share a dtype; the rows may be wider and get gradients in their own.
    Tokens in none of `bounds` are left as they are.
    """
    apply: Callable[..., Tensor] = _AddSegments.apply
    return apply(y_so, x_sd, rows_a_qd, rows_b_qo, ranks, bounds, scales)


class Padded(NamedTuple):
    """How one layer's rows become the grouped products' operand (G, R, ...), and back."""

    rank: int
    """R, the same for all layers of one product."""
    scale_q: Tensor
    """(Q,) fp32: of each row's slot. A carries it, so that no product has to."""
    at_p: Tensor
    """(G * R,) int64, the row that lies there; -1 for padding."""
    back_q: Tensor
    """(Q,) int64, where each row lies."""

    @classmethod
    def of(cls, ranks: Sequence[int], rank: int, scales: Sequence[float], device: Any) -> "Padded":
        """For slots of these `ranks`, none above `rank`, and these `scales`."""
        at_gr = torch.full((len(ranks), rank), -1)
        for slot, (start, end) in enumerate(spans(ranks)):
            at_gr[slot, : end - start] = torch.arange(start, end)
        at_p = at_gr.flatten()
        scale_q = torch.tensor(scales).float().repeat_interleave(torch.tensor(ranks))
        back_q = (at_p >= 0).nonzero(as_tuple=True)[0]
        return cls(rank, scale_q.to(device), at_p.to(device), back_q.to(device))


def padded_rank(ranks: Sequence[int]) -> int:
    """The rank to which the grouped form pads slots of these ranks."""
    return max(_STEP, -(-max(ranks) // _STEP) * _STEP)


def _stack(rows: Tensor, at_p: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """(Q, N) rows as (G, R, N). Padding is zero whatever lies elsewhere."""
    rows = rows.to(dtype)
    if len(at_p) != len(rows):  # else every slot has R rows
        rows = torch.where((at_p >= 0)[:, None], rows[at_p.clamp_min(0)], 0)
    return rows.view(-1, rank, rows.shape[1])


def _unstack(stack_grn: Tensor, back_q: Tensor) -> Tensor:
    """(G, R, N) as (Q, N) in fp32."""
    flat = stack_grn.reshape(-1, stack_grn.shape[2])
    return (flat if len(back_q) == len(flat) else flat[back_q]).float()


class _Grouped(torch.autograd.Function):
    # Tensors one by one, and none of them twice: torch.compile follows nothing else into one.
    @staticmethod
    def forward(
        ctx: Any,
        rank: int,
        kinds: tuple[int, ...],
        is_even: bool,
        x_sd: Tensor,
        ends_g: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        layers = _by_layer(kinds, tensors)
        a_gkd = _joined_a(layers, rank, x_sd.dtype)
        u_sk = each(x_sd, a_gkd.transpose(1, 2), ends_g, is_even)
        deltas = []
        for index, layer in enumerate(layers):
            u = u_sk[:, index * rank : (index + 1) * rank]
            b_gro = _stack(layer.rows_b, layer.at_p, rank, x_sd.dtype)
            deltas.append(each(u, b_gro, ends_g, is_even))
        ctx.save_for_backward(x_sd, u_sk, ends_g, *tensors)
        ctx.rank, ctx.kinds, ctx.is_even = rank, kinds, is_even
        return tuple(deltas)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        rank, is_even = ctx.rank, ctx.is_even
        x_sd, u_sk, ends_g, *tensors = ctx.saved_tensors
        layers = _by_layer(ctx.kinds, tensors)
        du, db = [], []
        for index, (given, layer) in enumerate(zip(dys, layers, strict=True)):
            dy = given.contiguous()
            b_gro = _stack(layer.rows_b, layer.at_p, rank, dy.dtype)
            du.append(each(dy, b_gro.transpose(1, 2), ends_g, is_even))
            u = u_sk[:, index * rank : (index + 1) * rank]
            db.append(_unstack(sums(u, dy, ends_g, is_even), layer.back_q))
        du_sk = torch.cat(du, dim=1) if len(du) > 1 else du[0]
        da_gkd = sums(du_sk, x_sd, ends_g, is_even)
        gradients: list[Tensor | None] = []
        for index, layer in enumerate(layers):
            da = _unstack(da_gkd[:, index * rank : (index + 1) * rank], layer.back_q)
            gradients += [da * layer.scale_q[:, None], db[index]]
        dx_sd = None
        if ctx.needs_input_grad[3]:
            dx_sd = each(du_sk, _joined_a(layers, rank, x_sd.dtype), ends_g, is_even)
        others = [None] * (len(tensors) - len(gradients))
        return None, None, None, dx_sd, None, *gradients, *others


class _Layer(NamedTuple):
    """What `_Grouped` takes of one layer."""

    rows_a: Tensor
    rows_b: Tensor
    scale_q: Tensor
    at_p: Tensor
    back_q: Tensor


def _by_layer(kinds: Sequence[int], tensors: Sequence[Tensor]) -> list[_Layer]:
    """Two tensors of each layer come first, then three of each kind."""
    start = 2 * len(kinds)
    return [
        _Layer(*tensors[2 * at : 2 * at + 2], *tensors[start + 3 * kind : start + 3 * kind + 3])
        for at, kind in enumerate(kinds)
    ]


def _joined_a(layers: Sequence[_Layer], rank: int, dtype: torch.dtype) -> Tensor:
    """scale * A of all layers, (G, layers * R, D)."""
    parts = [_stack(la.rows_a * la.scale_q[:, None], la.at_p, rank, dtype) for la in layers]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def grouped(
    x_sd: Tensor,
    ends_g: Tensor,
    rows_a: Sequence[Tensor],
    rows_b: Sequence[Tensor],
    kinds: Sequence[int],
    padded: Sequence[Padded],
    is_even: bool = False,
) -> tuple[Tensor, ...]:
    """scale_g * B_g A_g x of each of several layers with one input: (S, O_i) each, in x's dtype.

    x (S, D) is bf16; the rows (Q_i, D) and (Q_i, O_i) fp32, as are their gradients; layer i's lie
    as `padded[kinds[i]]` says. `ends_g` (G,) int32, ascending, are the tokens before which each
    slot ends; the last must be S, as what lies behind it is not written. A slot may have no tokens.
    `is_even`: all slots have the same number, and `ends_g` is not read. D and O_i are multiples
    of 8.
    """
    apply: Callable[..., tuple[Tensor, ...]] = _Grouped.apply
    used = sorted(set(kinds))
    tensors = [rows for pair in zip(rows_a, rows_b, strict=True) for rows in pair]
    for kind in used:
        tensors += [padded[kind].scale_q, padded[kind].at_p, padded[kind].back_q]
    own = tuple(used.index(kind) for kind in kinds)
    return apply(padded[used[0]].rank, own, is_even, x_sd, ends_g, *tensors)
