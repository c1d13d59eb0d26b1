"""Many LoRA adapters over one base, read only, on a GPU: each token's own matrices, and no others.

While few tokens decode, u of all slots comes with the base's product (`model/joint_banks.py`), and
what is left is each row's own u times its own B: `add_own`, one kernel for all layers that share
an input, which reads the B of each slot that has rows once. It finds the rows by their slots on the
device, so that a captured CUDA graph serves any mix.

In a prompt the host knows whose each stretch of tokens is, and cuts them into `Tiles` of one slot:
`down` reads x once for all layers that share it, and `up` writes what the base's product is then
added to (or adds to it), which costs that product nothing. Tiles too are read where they lie.

A captured pass of few tokens with prompts in it is read by both (`bank_mixed.py`).

Nothing of another slot is read, so what is not finite there stays there. The kernels are in
`bank_read_triton.py` and `bank_tiles_triton.py`; the definitions are here, and run elsewhere.

Shape legend: S tokens, D features in, O features out, N slots, R rank (padded with zeros), L layers
with one input, T tiles. A of all layers is (L N R, D), layer after layer, and B one flat tensor,
each layer's (N, R, O_i) after the other's.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tunefork.kernels.bank_stretches import Stretch
from tunefork.kernels.compiled import is_on_gpu

TILE = 64
"""Most tokens of a tile."""


class Tiles(NamedTuple):
    """All tokens of a pass, cut into pieces of one slot, or of none."""

    numbers_t3: Tensor
    """Slot or -1, first token and number of tokens (0: no tile); int32, on the device."""
    size: int = TILE


def lay_out_tiles(
    stretches: Sequence[Stretch], num_tokens: int, device: torch.device, size: int = TILE
) -> Tiles:
    """Of `stretches` in the order of their tokens, and of what lies between and behind them."""
    host = torch.tensor(cut(stretches, num_tokens, size), dtype=torch.int32).view(-1, 3)
    if device.type == "cuda":
        host = host.pin_memory()
    return Tiles(host.to(device, non_blocking=True), size)


def cut(
    stretches: Sequence[Stretch], num_tokens: int, size: int = TILE
) -> list[tuple[int, int, int]]:
    """Slot or -1, first token and number of tokens of each tile, as `lay_out_tiles`."""
    whole, at = [], 0
    for stretch in (*stretches, Stretch(-1, num_tokens, num_tokens)):
        whole += [Stretch(-1, at, stretch.first), stretch]
        at = stretch.last
    return [
        (slot, at, min(size, last - at))
        for slot, first, last in whole
        for at in range(first, last, size)
    ]


def add_own(
    y_so: Tensor, u_sk: Tensor, slot_s: Tensor, b: Tensor, sizes: Sequence[int], rank: int
) -> None:
    """y (S, O) += B_n u_n in place, n each row's slot; -1: y stays. O is the sum of `sizes`.

    u (S, L N R) is of all slots, layer after layer. Summed in fp32, rounded once.
    """
    if is_on_gpu(y_so) and y_so.dtype == torch.bfloat16:
        torch.ops.tunefork.bank_add_own(y_so, u_sk, slot_s, b, list(sizes), rank)
    else:
        add_own_reference(y_so, u_sk, slot_s, b, sizes, rank)


def add_own_reference(
    y_so: Tensor, u_sk: Tensor, slot_s: Tensor, b: Tensor, sizes: Sequence[int], rank: int
) -> None:
    """The definition of `add_own`."""
    slots = b.numel() // (rank * sum(sizes))
    at_s = slot_s.clamp_min(0).long()
    u_slnr = u_sk.reshape(-1, len(sizes), slots, rank).float()
    own_slr = u_slnr[torch.arange(len(at_s), device=at_s.device), :, at_s]
    deltas = [
        torch.bmm(own_slr[:, layer, None], b_nro[at_s].float())[:, 0]
        for layer, b_nro in enumerate(by_layer(b, sizes, slots, rank))
    ]
    # A row without a slot has looked at slot 0's, whatever lies there.
    delta_so = torch.where((slot_s >= 0)[:, None], torch.cat(deltas, dim=1), 0)
    y_so.copy_(y_so.float() + delta_so)


def by_layer(b: Tensor, sizes: Sequence[int], slots: int, rank: int) -> Iterator[Tensor]:
    """Each layer's B (N, R, O_i)."""
    parts = torch.split(b, [slots * rank * size for size in sizes])
    return (part.view(slots, rank, size) for part, size in zip(parts, sizes, strict=True))


def down(x_sd: Tensor, a_kd: Tensor, tiles: Tiles, layers: int, rank: int) -> Tensor:
    """u = A_n x (S, L R), n the slot of a token's tile; without one it may be anything."""
    if torch.compiler.is_compiling():
        found: Tensor = torch.ops.tunefork.bank_down(x_sd, a_kd, *tiles, layers, rank)
        return found
    return _down(x_sd, a_kd, tiles, layers, rank)


def _down(x_sd: Tensor, a_kd: Tensor, tiles: Tiles, layers: int, rank: int) -> Tensor:
    if is_on_gpu(x_sd) and x_sd.dtype == torch.bfloat16:
        from tunefork.kernels import bank_tiles_triton  # needs Triton, which comes with CUDA

        return bank_tiles_triton.down(x_sd, a_kd, *tiles, layers, rank)
    return down_reference(x_sd, a_kd, tiles, layers, rank)


def down_reference(x_sd: Tensor, a_kd: Tensor, tiles: Tiles, layers: int, rank: int) -> Tensor:
    """The definition of `down`."""
    a_lnrd = a_kd.view(layers, -1, rank, x_sd.shape[1])
    u_sk = x_sd.new_zeros(x_sd.shape[0], layers * rank)
    for slot, first, count in tiles.numbers_t3.tolist():
        if slot < 0:
            continue
        own_kd = a_lnrd[:, slot].flatten(0, 1)
        u_sk[first : first + count] = x_sd[first : first + count] @ own_kd.t()
    return u_sk


def up(
    y_so: Tensor,
    u_sk: Tensor,
    b: Tensor,
    tiles: Tiles,
    sizes: Sequence[int],
    rank: int,
    *,
    begins: bool = False,
) -> None:
    """y (S, O) += B_n u (S, L R) in place, n the slot of a token's tile; without one y stays.

    `begins`: as if y were zeros. It is not read.
    """
    if torch.compiler.is_compiling():
        torch.ops.tunefork.bank_up(y_so, u_sk, b, *tiles, list(sizes), rank, begins)
    else:
        _up(y_so, u_sk, b, tiles, sizes, rank, begins=begins)


def _up(
    y_so: Tensor,
    u_sk: Tensor,
    b: Tensor,
    tiles: Tiles,
    sizes: Sequence[int],
    rank: int,
    *,
    begins: bool,
) -> None:
    if is_on_gpu(y_so) and y_so.dtype == torch.bfloat16:
        from tunefork.kernels import bank_tiles_triton

        return bank_tiles_triton.up(y_so, u_sk, b, *tiles, sizes, rank, begins=begins)
    return up_reference(y_so, u_sk, b, tiles, sizes, rank, begins=begins)


def up_reference(
    y_so: Tensor,
    u_sk: Tensor,
    b: Tensor,
    tiles: Tiles,
    sizes: Sequence[int],
    rank: int,
    *,
    begins: bool = False,
) -> None:
    """The definition of `up`."""
    if begins:
        y_so.zero_()
    slots = b.numel() // (rank * sum(sizes))
    ys = torch.split(y_so, list(sizes), dim=1)
    for layer, (y_so, b_nro) in enumerate(zip(ys, by_layer(b, sizes, slots, rank), strict=True)):
        for slot, first, count in tiles.numbers_t3.tolist():
            if slot >= 0:
                u_tr = u_sk[first : first + count, layer * rank : (layer + 1) * rank]
                y_so[first : first + count].addmm_(u_tr, b_nro[slot])


@torch.library.custom_op("tunefork::bank_add_own", mutates_args=("y",), device_types="cuda")
def _add_own(
    y: Tensor, u: Tensor, slots: Tensor, b: Tensor, sizes: Sequence[int], rank: int
) -> None:
    from tunefork.kernels import bank_read_triton

    bank_read_triton.add_own(y, u, slots, b, sizes, rank)


@torch.library.custom_op("tunefork::bank_down", mutates_args=())
def _bank_down(x: Tensor, a: Tensor, tiles: Tensor, size: int, layers: int, rank: int) -> Tensor:
    return _down(x, a, Tiles(tiles, size), layers, rank)


@_bank_down.register_fake
def _(x: Tensor, a: Tensor, tiles: Tensor, size: int, layers: int, rank: int) -> Tensor:
    return x.new_empty(x.shape[0], layers * rank)


@torch.library.custom_op("tunefork::bank_up", mutates_args=("y",))
def _bank_up(
    y: Tensor,
    u: Tensor,
    b: Tensor,
    tiles: Tensor,
    size: int,
    sizes: Sequence[int],
    rank: int,
    begins: bool,
) -> None:
    _up(y, u, b, Tiles(tiles, size), sizes, rank, begins=begins)
