"""Sums of rows against the definition, token by token."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tunefork.kernels.bank_rows import Blocks, Rows
from tunefork.kernels.bank_stretches import (
    Layout,
    Stretch,
    add_stretches,
    add_stretches_reference,
    lay_out,
)
from tunefork.kernels.bank_tables import TERMS, Matrices

WIDE, RANK, SLOTS = 24, 3 * TERMS, 9
RANKS = (4, TERMS, 17, RANK, 1, 20, 2, 3, 33)
"""Of the adapter in each slot."""


Add = Callable[[Tensor, Tensor, Matrices, Layout], None]


def _need_kernel(matrices: Matrices, add: Add) -> None:
    if add is add_stretches and matrices.kernel is None:
        pytest.skip("needs a compiler")


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
@pytest.mark.parametrize("add", [add_stretches, add_stretches_reference])
def test_each_token_has_its_own_delta(
    lengths: list[tuple[int, int]], sizes: tuple[int, ...], dtype: torch.dtype, add: Add
) -> None:
    torch.manual_seed(0)
    matrices, products = _filled(sizes, dtype)
    _need_kernel(matrices, add)
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
    add(y_so.clone(), x_sd + 1, matrices, layout)  # what is made of a layout is for any input
    add(y_so, x_sd, matrices, layout)
    # bf16: rounding of u, of the delta and of the sum, each 2^-8 of numbers up to 150.
    tolerance = 1e-3 if dtype == torch.float32 else 1.5
    assert torch.allclose(y_so.float(), expected, atol=tolerance)
    assert (y_so.float() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("add", [add_stretches, add_stretches_reference])
def test_a_slot_that_is_not_finite_spoils_no_other(add: Add) -> None:
    matrices = Matrices(3, TERMS, WIDE, (40,), torch.float32)
    _need_kernel(matrices, add)
    nothing = torch.full((TERMS, WIDE), torch.nan), torch.full((TERMS, 40), torch.inf)
    matrices.write(0, 1, *nothing)
    x_sd, y_so = torch.ones(40, WIDE), torch.ones(40, 40)
    # Short and long, before and behind slot 1, whose own token comes between.
    stretches = [(0, 0, 2), (1, 2, 3), (2, 3, 4), (0, 4, 22), (2, 22, 40)]
    layout = lay_out([Stretch(*one) for one in stretches], [TERMS] * 5)
    add(y_so, x_sd, matrices, layout)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_given_parts_of_rows(dtype: torch.dtype) -> None:
    """Of x, and of y, whose other columns stay; two threads, and a block for each size."""
    matrices = Matrices(2, TERMS, WIDE, (600, 72), dtype)
    _need_kernel(matrices, add_stretches)
    for table in (matrices.a_ncde, matrices.b_ncto):
        table.normal_()
    both_sx, y_so = torch.randn(40, WIDE + 9).to(dtype), torch.randn(40, 700).to(dtype)
    layout = lay_out([Stretch(1, 1, 13), Stretch(0, 13, 20), Stretch(1, 22, 39)], [TERMS] * 3)
    expected, before = y_so.clone(), y_so.clone()
    add_stretches_reference(expected[:, 5:677], both_sx[:, 4 : 4 + WIDE], matrices, layout)
    add_stretches(y_so[:, 5:677], both_sx[:, 4 : 4 + WIDE], matrices, layout)
    assert torch.allclose(y_so.float(), expected.float(), rtol=2**-6, atol=0.5)
    assert torch.equal(y_so[:, :5], before[:, :5]) and torch.equal(y_so[:, 677:], before[:, 677:])
    assert not torch.equal(y_so[:, 5:677], before[:, 5:677])


_TOLD = [Stretch(1, 0, 3)]


@pytest.mark.parametrize(
    ("x", "y", "told", "ranks", "dtype"),
    [
        ((3, WIDE - 1), (3, 40), _TOLD, [4], torch.float32),
        ((4, WIDE), (3, 40), _TOLD, [4], torch.float32),
        ((3, WIDE), (3, 39), _TOLD, [4], torch.float32),
        ((3, WIDE), (3, 40), _TOLD, [4], torch.bfloat16),
        ((2, WIDE), (2, 40), _TOLD, [4], torch.float32),
        ((3, WIDE), (3, 40), [Stretch(2, 0, 3)], [4], torch.float32),
        ((3, WIDE), (3, 40), [Stretch(-1, 0, 3)], [4], torch.float32),
        ((3, WIDE), (3, 40), _TOLD, [TERMS + 1], torch.float32),
    ],
)
def test_the_kernel_refuses_what_is_not_there(
    x: tuple[int, int],
    y: tuple[int, int],
    told: list[Stretch],
    ranks: list[int],
    dtype: torch.dtype,
) -> None:
    matrices = Matrices(2, TERMS, WIDE, (40,), torch.float32)
    _need_kernel(matrices, add_stretches)
    with pytest.raises(ValueError, match="tables of 24 to 40|beyond"):
        add_stretches(torch.zeros(y).to(dtype), torch.zeros(x), matrices, lay_out(told, ranks))
    y_so = torch.zeros(3, 40)
    add_stretches(y_so, torch.ones(3, WIDE), matrices, lay_out([], []))
    assert not y_so.any()


@pytest.mark.parametrize("tokens", [130, 140])
def test_long_stretches_are_products(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 500,000 numbers of x and y on; what is shorter beside them is the kernel's."""
    matrices = Matrices(2, TERMS, 600, (3000,), torch.bfloat16)
    _need_kernel(matrices, add_stretches)
    for table in (matrices.a_ncde, matrices.b_ncto):
        table.normal_()
    done, add = list[int](), Rows.add

    def noting(rows: Rows, y_so: Tensor, x_sd: Tensor, blocks: Blocks) -> None:
        done.append(blocks.tokens)
        add(rows, y_so, x_sd, blocks)

    monkeypatch.setattr(Rows, "add", noting)
    layout = lay_out([Stretch(0, 0, 2), Stretch(1, 2, 2 + tokens)], [TERMS] * 2)
    x_sd, y_so = torch.randn(2 + tokens, 600).bfloat16(), torch.randn(2 + tokens, 3000).bfloat16()
    expected = y_so.clone()
    add_stretches_reference(expected, x_sd, matrices, layout)
    add_stretches(y_so, x_sd, matrices, layout)
    assert (y_so.float() - expected.float()).norm() < 0.01 * expected.float().norm()
    assert done == [2 + tokens if tokens == 130 else 2]


def test_a_copy_is_read_where_it_lies_and_gradients_are_pytorchs() -> None:
    matrices = Matrices(1, TERMS, WIDE, (40,), torch.float32)
    _need_kernel(matrices, add_stretches)
    layout, x_sd = lay_out([Stretch(0, 0, 3)], [TERMS]), torch.ones(3, WIDE)
    twin = copy.deepcopy(matrices)
    for table in (matrices.a_ncde, matrices.b_ncto):
        table.fill_(1.0)
    found = [torch.zeros(3, 40) for _ in range(2)]
    for y_so, one in zip(found, (matrices, twin), strict=True):
        add_stretches(y_so, x_sd, one, copy.deepcopy(layout))
    assert found[0].eq(TERMS * WIDE).all() and not found[1].any()
    x_sd.requires_grad_()
    y_so = torch.zeros(3, 40)
    add_stretches(y_so, x_sd, matrices, lay_out([Stretch(0, 0, 3)], [TERMS]))
    y_so.sum().backward()
    assert x_sd.grad is not None and x_sd.grad.eq(TERMS * 40).all()


def test_rows_that_are_not_numbers_are_rounded_to_what_is_none() -> None:
    """In bf16: the largest NaN has no carry, an infinity stays one, ties go to even."""
    matrices = Matrices(1, TERMS, WIDE, (16,), torch.bfloat16)
    _need_kernel(matrices, add_stretches)
    given = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -0.0, 3e38, 1e-40])
    y_so = given.bfloat16().repeat(3)[:16].reshape(1, 16).clone()
    expected = y_so.clone()
    add_stretches(y_so, torch.ones(1, WIDE).bfloat16(), matrices, lay_out([Stretch(0, 0, 1)], [4]))
    assert torch.equal(y_so.nan_to_num(7.0), expected.nan_to_num(7.0))
