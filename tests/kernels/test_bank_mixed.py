"""Rows that decode and prompts in one pass: as defined, against the sum of each token."""

import pytest
import torch
from torch import Tensor

from tests.kernels.bank_reads import Read, draw
from tunefork.kernels.bank_mixed import Mixed, add_mixed

SLOTS_M = [2, -1, 0, 0, 1, -1, -1, -1]
"""Of the first tokens; the last three are a prompt's."""
TILES = [(1, 5, 4), (1, 9, 2), (0, 11, 1), (3, 14, 4), (-1, 0, 0), (-1, 0, 0)]


def _mixed() -> tuple[Mixed, Tensor]:
    """And the slot of each of 20 tokens."""
    slot_s = torch.full((20,), -1)
    slot_s[: len(SLOTS_M)] = torch.tensor(SLOTS_M)
    for slot, first, count in TILES:
        slot_s[first : first + count] = slot
    slot_m, tiles_t3 = (torch.tensor(told, dtype=torch.int32) for told in (SLOTS_M, TILES))
    return Mixed(slot_m, tiles_t3, size=4), slot_s


def _add(read: Read, mixed: Mixed) -> None:
    add_mixed(read.y_so, read.u_sk(), mixed, read.b, read.sizes, read.rank)


@pytest.mark.parametrize("sizes", [(24,), (40, 8, 16)])
def test_each_token_adds_what_its_own_adapter_gives(sizes: tuple[int, ...]) -> None:
    read, (mixed, slot_s) = draw(20, 4, 6, 32, sizes), _mixed()
    expected, before = read.expected(slot_s), read.y_so.clone()
    _add(read, mixed)
    torch.testing.assert_close(read.y_so, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(read.y_so[slot_s < 0], before[slot_s < 0])


@pytest.mark.parametrize("slot", [0, 1, 3])
def test_what_is_not_finite_stays_in_its_slot(slot: int) -> None:
    read, (mixed, slot_s) = draw(20, 4, 6, 32, (40, 8)), _mixed()
    read.a_kd.view(2, 4, 6, 32)[:, slot, 0] = torch.nan
    read.b.split([4 * 6 * 40, 4 * 6 * 8])[0].view(4, 6, 40)[slot, 0] = torch.inf
    _add(read, mixed)
    assert torch.equal(~read.y_so.isfinite().all(dim=1), slot_s == slot)
