"""Rows that decode and prompts in one pass, by Triton on a GPU: against the sum of each token."""

import pytest
import torch
from torch import Tensor

from tests.kernels.bank_reads import Read
from tests.kernels.test_gpu_bank_read import SHAPES, _draw, _is_close
from tunefork.kernels.bank_mixed import Mixed, add_mixed
from tunefork.kernels.bank_read import cut
from tunefork.kernels.bank_stretches import Stretch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, ROWS = 192, 64
MOST_TILES = (TOKENS + 63 * ROWS) // 64


def _fill(mixed: Mixed, slots: int, decoding: int, prompts: list[int]) -> Tensor:
    """Lay a pass out whose rows' slots are drawn; returns the slot of each token."""
    slot_s = torch.full((TOKENS,), -1, dtype=torch.int32)
    slot_s[:decoding] = torch.randint(-1, slots, (decoding,))
    slot_m = slot_s[:ROWS].clone()
    at, told = decoding, []
    for new in prompts:
        told.append(Stretch(int(torch.randint(slots, ())), at, at + new))
        slot_s[at : at + new] = told[-1].slot
        at += new
    tiles = [tile for tile in cut(told, TOKENS) if tile[0] >= 0]
    tiles += [(-1, 0, 0)] * (MOST_TILES - len(tiles))
    mixed.slot_m.copy_(slot_m)
    mixed.numbers_t3.copy_(torch.tensor(tiles))
    return slot_s.cuda()


def _mixed() -> Mixed:
    numbers = torch.zeros(ROWS + 3 * MOST_TILES, dtype=torch.int32, device="cuda")
    return Mixed(numbers[:ROWS], numbers[ROWS:].view(MOST_TILES, 3))


def _add(read: Read, u_sk: Tensor, mixed: Mixed) -> None:
    add_mixed(read.y_so, u_sk, mixed, read.b, read.sizes, read.rank)


PASSES = [(63, [128]), (0, [192]), (64, [2] * 64), (3, [1, 65, 100]), (40, []), (64, [64, 64])]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["launched", "captured", "compiled"])
def test_each_token_adds_what_its_own_adapter_gives(
    way: str, shape: tuple[int, int, int, tuple[int, ...]]
) -> None:
    read, mixed = _draw(TOKENS, shape), _mixed()
    before, u_sk = read.y_so.clone(), read.u_sk()
    add = torch.compile(_add, fullgraph=True) if way == "compiled" else _add
    _fill(mixed, shape[0], 0, [])
    add(read, u_sk, mixed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(read, u_sk, mixed)
    for decoding, prompts in PASSES:
        slot_s = _fill(mixed, shape[0], decoding, prompts)
        read.y_so.copy_(before)
        if way == "launched":
            add(read, u_sk, mixed)
        else:
            graph.replay()
        assert _is_close(read.y_so, read._replace(y_so=before).expected(slot_s))
        assert torch.equal(read.y_so[slot_s < 0], before[slot_s < 0])


@pytest.mark.parametrize("slot", [0, 1])
def test_what_is_not_finite_stays_in_its_slot(slot: int) -> None:
    read, mixed = _draw(TOKENS, (3, 16, 64, (64, 32))), _mixed()
    read.a_kd.view(2, 3, 16, 64)[:, slot, 0] = torch.nan
    read.b.split([3 * 16 * 64, 3 * 16 * 32])[0].view(3, 16, 64)[slot, 0] = torch.inf
    slot_s = _fill(mixed, 3, 40, [30, 30, 30])
    _add(read, read.u_sk(), mixed)
    assert torch.equal(~read.y_so.isfinite().all(dim=1), slot_s == slot)
