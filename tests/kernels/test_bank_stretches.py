"""Sums of rows against the definition, token by token."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels.bank_stretches import TERMS, Matrices, Stretch, add_stretches, lay_out

WIDE, RANK, SLOTS = 24, 3 * TERMS, 9
RANKS = (4, TERMS, 17, RANK, 1, 20, 2, 3, 33)
"""Of the adapter in each slot."""


def _filled(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Matrices, list[list[Tensor]]]:
    """Matrices, and B_n A_n (O_i, D) of each slot and layer, in fp32."""
    matrices = Matrices(SLOTS, RANK, WIDE, sizes, dtype)
    products: list[list[Tensor]] = []
    for slot, rank in enumerate(RANKS):
        products.append([])
        for layer, size in enumerate(sizes):
            a_rd, b_ro = torch.randn(rank, WIDE).to(dtype), torch.randn(rank, size).to(dtype)
            matrices.write(layer, slot, torch.ones(RANK, WIDE), torch.ones(RANK, size))  # before
            matrices.write(layer, slot, a_rd, b_ro)
            products[slot].append(b_ro.float().t() @ a_rd.float())
    return matrices, products


@pytest.mark.parametrize(
    "lengths",
    [
        [(0, 2), (1, 2), (2, 2), (-1, 3)],  # decoding, as many each
        [(1, 1), (4, 2), (6, 1), (7, 1)],  # each of one piece
        [(-1, 1), (1, 1), (3, 2), (3, 90), (-1, 20), (0, 70), (5, 1)],  # pieces of prompts between
        [(8, 80), (3, 80), (4, 80)],
        [(3, 1)],
        [(-1, 5)],
    ],
)
@pytest.mark.parametrize("sizes", [(40,), (24, 16, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_has_its_own_delta(
    lengths: list[tuple[int, int]], sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    matrices, products = _filled(sizes, dtype)
    stretches: list[Stretch] = []
    slots: list[int] = []
    for slot, length in lengths:
        if slot >= 0:
            stretches.append(Stretch(slot, len(slots), len(slots) + length))
        slots += [slot] * length
    x_sd, y_so = torch.randn(len(slots), WIDE).to(dtype), torch.randn(len(slots), sum(sizes))
    y_so = y_so.to(dtype)
    expected = y_so.float()
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected[token] += torch.cat([own @ x_sd[token].float() for own in products[slot]])
    layout = lay_out(stretches, [RANKS[stretch.slot] for stretch in stretches])
    add_stretches(y_so.clone(), x_sd + 1, matrices, layout)  # indices are made for any input
    add_stretches(y_so, x_sd, matrices, layout)
    # bf16: rounding of u, of the delta and of the sum, each 2^-8 of numbers up to 150.
    tolerance = 1e-3 if dtype == torch.float32 else 1.5
    assert torch.allclose(y_so.float(), expected, atol=tolerance)
    assert (y_so.float() - expected).norm() <= 0.01 * expected.norm()


def test_a_slot_that_is_not_finite_spoils_no_other() -> None:
    matrices = Matrices(3, TERMS, WIDE, (40,), torch.float32)
    nothing = torch.full((TERMS, WIDE), torch.nan), torch.full((TERMS, 40), torch.inf)
    matrices.write(0, 1, *nothing)
    x_sd, y_so = torch.ones(40, WIDE), torch.ones(40, 40)
    # Short and long, before and behind slot 1, whose own token comes between.
    stretches = [(0, 0, 2), (1, 2, 3), (2, 3, 4), (0, 4, 22), (2, 22, 40)]
    layout = lay_out([Stretch(*one) for one in stretches], [TERMS] * 5)
    add_stretches(y_so, x_sd, matrices, layout)
    is_finite = y_so.isfinite().all(1)
    assert not is_finite[2] and is_finite.sum() == 39
    assert torch.equal(y_so[is_finite], torch.ones(39, 40))


def test_what_is_written_is_read() -> None:
    matrices = Matrices(2, RANK, WIDE, (40, 8), torch.float32)
    a_rd, b_ro = torch.randn(20, WIDE), torch.randn(20, 8)
    matrices.write(1, 1, a_rd, b_ro)
    for found, given in zip(matrices.read(1, 1), (a_rd, b_ro), strict=True):
        assert torch.equal(found[:20], given) and not found[20:].any()
    matrices.write(1, 1, None, None)
    assert not matrices.a_ncde.any() and not matrices.b_ncto.any()


def test_a_slot_takes_no_more_than_its_ranks_do() -> None:
    """As `embedded.slots` says it: of each layer, rank x (features in + out)."""
    matrices = Matrices(5, RANK, WIDE, (40, 8, 24), torch.bfloat16)
    taken = matrices.a_ncde.nbytes + matrices.b_ncto.nbytes
    assert taken == 5 * RANK * ((WIDE + 40) + (WIDE + 8) + (WIDE + 24)) * 2
