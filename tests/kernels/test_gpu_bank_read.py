"""The Triton kernels of banks that are only read, on a GPU: against the sum of each token."""

import random

import pytest
import torch
from torch import Tensor

from tests.kernels.bank_reads import Read, draw
from tunefork.kernels.bank_read import Tiles, cut, down, lay_out_tiles, up
from tunefork.kernels.bank_stretches import Stretch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [
    (33, 16, 4096, (4096, 1024, 1024)),
    (33, 16, 4096, (4096,)),
    (5, 16, 576, (576, 192, 192)),  # blocks that are not full
    (3, 48, 200, (100, 36)),  # a rank that is no power of two; rows that are not aligned
    (4, 128, 256, (512, 512)),
]


def _draw(tokens: int, shape: tuple[int, int, int, tuple[int, ...]]) -> Read:
    slots, rank, features, sizes = shape
    return draw(tokens, slots, rank, features, sizes, dtype=torch.bfloat16, device="cuda")


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Values of size one, summed in fp32 of a u that is rounded to bf16, and rounded again."""
    return bool(torch.allclose(found.float(), expected, rtol=2**-7, atol=2**-5))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [2, 24, 64, 300])
def test_each_row_adds_what_its_own_adapter_gives(
    rows: int, shape: tuple[int, int, int, tuple[int, ...]]
) -> None:
    read = _draw(rows, shape)
    mixed = torch.randint(-1, shape[0], (rows,), dtype=torch.int32, device="cuda")
    for slot_s in (mixed, mixed.clamp(-1, 0), torch.full_like(mixed, shape[0] - 1)):
        found = read.added(slot_s)
        assert _is_close(found, read.expected(slot_s))
        assert torch.equal(found[slot_s < 0], read.y_so[slot_s < 0])


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_add_what_their_own_adapter_gives(
    shape: tuple[int, int, int, tuple[int, ...]], begins: bool
) -> None:
    stretches = [Stretch(2, 3, 140), Stretch(0, 140, 141), Stretch(2, 141, 150)]
    read = _draw(170, shape)
    slot_s = torch.full((170,), -1, device="cuda")
    for slot, first, last in stretches:
        slot_s[first:last] = slot
    expected, before = read.expected(slot_s), read.y_so.clone()
    tiles = lay_out_tiles(stretches, 170, read.x_sd.device)
    u_sk = down(read.x_sd, read.a_kd, tiles, len(read.sizes), read.rank)
    up(read.y_so, u_sk, read.b, tiles, read.sizes, read.rank, begins=begins)
    found = read.y_so + before if begins else read.y_so
    assert _is_close(found, expected)
    assert torch.equal(found[slot_s < 0], before[slot_s < 0])


@pytest.mark.parametrize("slot", [0, 1])
def test_what_is_not_finite_stays_in_its_slot(slot: int) -> None:
    read = _draw(20, (3, 16, 64, (64, 32)))
    read.a_kd.view(2, 3, 16, 64)[:, slot, 0] = torch.nan
    read.b.split([3 * 16 * 64, 3 * 16 * 32])[0].view(3, 16, 64)[slot, 0] = torch.inf
    slot_s = torch.arange(20, dtype=torch.int32, device="cuda") % 4 - 1
    found = read.added(slot_s)
    assert bool(found[slot_s != slot].isfinite().all())
    assert not bool(found[slot_s == slot].isfinite().all())


def test_a_captured_one_reads_the_slots_where_they_lie() -> None:
    read = _draw(24, SHAPES[0])
    slot_s = torch.zeros(24, dtype=torch.int32, device="cuda")
    read.added(slot_s)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = read.added(slot_s)
    for _ in range(3):
        slot_s.random_(-1, 33)
        graph.replay()
        assert _is_close(found, read.expected(slot_s))


def test_captured_tiles_are_read_where_they_lie() -> None:
    """As many as may be needed: those that are not needed are no tiles."""
    read = _draw(170, SHAPES[2])
    before = read.y_so.clone()
    tiles = Tiles(torch.zeros(24, 3, dtype=torch.int32, device="cuda"))
    compiled = torch.compile(_add_tiles, fullgraph=True)  # by operators, as serving's layers

    def fill(chosen: random.Random) -> Tensor:
        """Whose each token is then."""
        ends = sorted(chosen.sample(range(171), 8))
        slots = [chosen.randrange(5) for _ in ends[1:]]
        told = [Stretch(*one) for one in zip(slots, ends, ends[1:], strict=False)]
        found = cut(told, 170)
        found += [(-1, 0, 0)] * (24 - len(found))
        tiles.numbers_t3.copy_(torch.tensor(found))
        slot_s = torch.full((170,), -1, device="cuda")
        for slot, first, last in told:
            slot_s[first:last] = slot
        return slot_s

    chosen = random.Random(0)
    for way in (_add_tiles, compiled):
        read.y_so.copy_(before)
        fill(chosen)
        way(read, tiles)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            way(read, tiles)
        for _ in range(3):
            slot_s = fill(chosen)
            read.y_so.copy_(before)
            graph.replay()
            assert _is_close(read.y_so, read._replace(y_so=before).expected(slot_s))
            assert torch.equal(read.y_so[slot_s < 0], before[slot_s < 0])


def _add_tiles(read: Read, tiles: Tiles) -> None:
    u_sk = down(read.x_sd, read.a_kd, tiles, len(read.sizes), read.rank)
    up(read.y_so, u_sk, read.b, tiles, read.sizes, read.rank)
