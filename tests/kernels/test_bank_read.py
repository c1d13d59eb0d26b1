"""Banks that are only read: what a GPU's kernels do, as defined, against the sum of each token."""

import pytest
import torch

from tests.kernels.bank_reads import Read, draw
from tunefork.kernels.bank_read import down, lay_out_tiles, up
from tunefork.kernels.bank_stretches import Stretch

SIZES = [(24,), (40, 8, 16)]
STRETCHES = [Stretch(2, 1, 5), Stretch(0, 5, 6), Stretch(2, 6, 17)]


@pytest.mark.parametrize("sizes", SIZES)
def test_each_row_adds_what_its_own_adapter_gives(sizes: tuple[int, ...]) -> None:
    read = draw(23, 5, 6, 32, sizes)
    slot_s = torch.randint(-1, 5, (23,), dtype=torch.int32)
    found = read.added(slot_s)
    torch.testing.assert_close(found, read.expected(slot_s), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[slot_s < 0], read.y_so[slot_s < 0])


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_tiles_add_what_their_own_adapter_gives(sizes: tuple[int, ...], begins: bool) -> None:
    read = draw(20, 3, 6, 32, sizes)
    slot_s = torch.full((20,), -1)
    for slot, first, last in STRETCHES:
        slot_s[first:last] = slot
    expected, before = read.expected(slot_s), read.y_so.clone()
    _add_tiles(read, begins=begins)
    found = read.y_so + before if begins else read.y_so
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[slot_s < 0], before[slot_s < 0])


@pytest.mark.parametrize("slot", [0, 1])
def test_what_is_not_finite_stays_in_its_slot(slot: int) -> None:
    """Also of slot 0, at which tokens without one look where there is nothing else to look at."""
    read = draw(20, 3, 6, 32, (40, 8))
    read.a_kd.view(2, 3, 6, 32)[:, slot, 0] = torch.nan
    read.b.split([3 * 6 * 40, 3 * 6 * 8])[0].view(3, 6, 40)[slot, 0] = torch.inf
    slot_s = torch.arange(-1, 19, dtype=torch.int32) % 4 - 1
    found = read.added(slot_s)
    assert found[slot_s != slot].isfinite().all() and not found[slot_s == slot].isfinite().all()
    _add_tiles(read)
    is_its = torch.zeros(20, dtype=torch.bool)
    for own, first, last in STRETCHES:
        is_its[first:last] = own == slot
    assert read.y_so[~is_its].isfinite().all()


def _add_tiles(read: Read, *, begins: bool = False) -> None:
    tiles = lay_out_tiles(STRETCHES, 20, torch.device("cpu"), size=4)
    assert tiles.numbers_t3[0].tolist() == [-1, 0, 1]
    assert tiles.numbers_t3[-2:].tolist() == [[2, 14, 3], [-1, 17, 3]]
    u_sk = down(read.x_sd, read.a_kd, tiles, len(read.sizes), read.rank)
    up(read.y_so, u_sk, read.b, tiles, read.sizes, read.rank, begins=begins)
