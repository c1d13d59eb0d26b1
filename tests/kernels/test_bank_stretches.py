"""Deltas stretch by stretch against the definition, token by token."""

import pytest
import torch

from tunefork.kernels.bank_stretches import Matrices, Stretch, add_stretches, lay_out

WIDE, OUT, RANK, SLOTS = 24, 40, 6, 9


@pytest.mark.parametrize(
    "lengths",
    [
        [(-1, 3), (0, 2), (1, 2), (2, 2)],  # decoding, as many each
        [(0, 1), (1, 3), (2, 2), (8, 1)],  # padded, and a gap
        [(-1, 1), (1, 1), (3, 2), (3, 90), (-1, 20), (0, 70), (1, 17)],  # pieces of prompts
        [(0, 1), (-1, 1), (2, 4), (3, 1), (5, 3)],  # few of each slot
        [(2, 80), (3, 80), (4, 80), (6, 80)],  # prompts of one length, and one apart
        [(4, 200)],
        [(-1, 5)],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stretches_are_the_sum_over_each_tokens_own(
    lengths: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    a_nrd, b_nro = torch.randn(SLOTS, RANK, WIDE), torch.randn(SLOTS, RANK, OUT)
    a_nrd[:, 4:], b_nro[:, 4:] = 0, 0
    b_nro = b_nro.to(dtype)
    stretches: list[Stretch] = []
    slots: list[int] = []
    for slot, length in lengths:
        if slot >= 0:
            stretches.append(Stretch(slot, len(slots), len(slots) + length))
        slots += [slot] * length
    x_sd, y_so = torch.randn(len(slots), WIDE).to(dtype), torch.randn(len(slots), OUT).to(dtype)
    expected = y_so.float()
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected[token] += x_sd[token].float() @ a_nrd[slot].t() @ b_nro[slot].float()
    layout, matrices = lay_out(stretches, rank=4), Matrices(a_nrd, b_nro)
    add_stretches(y_so.clone(), x_sd + 1, matrices, layout)  # of another input before
    found = add_stretches(y_so, x_sd, matrices, layout)
    assert found is y_so
    # bf16: rounding of u, of B and of the sum, each 2^-8 of numbers up to 50.
    tolerance = 1e-4 if dtype == torch.float32 else 0.6
    assert torch.allclose(found.float(), expected, atol=tolerance)


def test_a_slot_that_is_not_finite_spoils_no_other() -> None:
    a_nrd, b_nro = torch.zeros(3, RANK, WIDE), torch.zeros(3, RANK, OUT)
    a_nrd[1] = torch.nan
    x_sd, y_so = torch.ones(4, WIDE), torch.ones(4, OUT)
    matrices = Matrices(a_nrd, b_nro)
    layout = lay_out([Stretch(0, 0, 2), Stretch(2, 2, 4)], rank=RANK)  # slot 1 lies between
    assert torch.equal(add_stretches(y_so, x_sd, matrices, layout), torch.ones(4, OUT))


def test_views_are_not_kept_without_end() -> None:
    matrices = Matrices(torch.zeros(20, RANK, WIDE), torch.zeros(20, RANK, OUT))
    for lowest in range(19):
        for highest in range(lowest + 1, 20):
            part = lay_out([Stretch(lowest, 0, 1), Stretch(highest, 1, 2)], rank=1).padded[0]
            assert matrices.of(part, 1)[0].shape == (part.highest - part.lowest, WIDE, 1)
    assert len(matrices._views) <= 64
