"""Numbers of a pass with prompts: what fills it up belongs to nobody, and tiles have room."""

import pytest
import torch

from tunefork.kernels.bank_mixed import Mixed
from tunefork.kernels.bank_read import TILE
from tunefork.serve.engines.layout import BASE, Layout, Part

APART = 256
"""Tokens of the cache from where a row's region begins to where the next one's does."""


def part_of(row: int, new: int, position: int, slot: int, *, wants_logits: bool = True) -> Part:
    """Row `row` of a pass: `new` tokens behind `position` others."""
    ids = [(11 * row + 5 * at) % 200 + 20 for at in range(new)]
    return Part(ids, position, (row + 1) * APART, slot, wants_logits)


def test_what_fills_a_pass_up_belongs_to_a_row_that_sees_nothing() -> None:
    layout = Layout(300, 5, torch.device("cpu"))
    for numbers in layout.numbers.values():
        numbers[:] = 77  # of a pass before
    parts = [
        part_of(0, 1, 9, 2),
        part_of(1, 70, 0, 2, wants_logits=False),
        part_of(2, 2, 3, BASE),
    ]
    _, _, wanted = layout.lay_out(parts)
    layout.fill_up(parts, wanted, 128)
    found = {name: numbers.tolist() for name, numbers in layout.numbers.items()}
    assert found["starts_q"] == [0, 1, 71, 73, 128, 128]
    assert found["starts_k"][:3] == [APART, 2 * APART, 3 * APART]
    assert found["used"] == [10, 70, 5, 0, 0]
    assert found["decoding"] == [10, 0, 0, 0, 0]
    assert found["starts_rest"] == [1, 1, 71, 73, 128, 128]
    assert (wanted, found["last"]) == (2, [0, 72, 0, 0, 0])
    assert set(found["write"][73:128]) == {0} and set(found["slots"][71:128]) == {BASE}
    tiles = layout.tiles(128).numbers_t3.tolist()
    assert tiles == [[2, 0, 64], [2, 64, 7], [-1, 71, 57], *[[-1, 0, 0]] * (len(tiles) - 3)]


def test_among_few_tokens_rows_that_decode_are_in_no_tile() -> None:
    """Nor is a token without an adapter, or a row of one token behind a prompt apart from it."""
    layout = Layout(300, 6, torch.device("cpu"), few=128)
    for numbers in layout.numbers.values():
        numbers[:] = 77  # of a pass before
    lengths = [(1, 2), (1, BASE), (70, 2), (1, 2), (4, BASE)]
    parts = [part_of(row, new, 5, slot) for row, (new, slot) in enumerate(lengths)]
    layout.lay_out(parts)
    layout.fill_up(parts, 0, 128)
    mixed = layout.tiles(128)
    assert isinstance(mixed, Mixed) and mixed.slot_m.tolist() == [2, BASE, BASE, BASE, BASE]
    assert mixed.numbers_t3[:3].tolist() == [[2, 2, 64], [2, 66, 7], [BASE, 0, 0]]
    assert not mixed.numbers_t3[3:, 2].any()
    layout.fill_up(parts, 0, 192)
    assert not isinstance(layout.tiles(192), Mixed)


@pytest.mark.parametrize("lengths", [[TILE + 1] * 7, [1] * 7, [3 * TILE], [TILE, 1, TILE - 1]])
def test_tiles_have_room_wherever_rows_end(lengths: list[int]) -> None:
    """Each row with a slot of its own, and a size that leaves one token more, or none."""
    parts = [part_of(row, new, 0, row) for row, new in enumerate(lengths)]
    for tokens in (sum(lengths), sum(lengths) + 1):
        layout = Layout(tokens + 8, 8, torch.device("cpu"))
        layout.lay_out(parts)
        layout.fill_up(parts, 0, tokens)
        tiles = [tile for tile in layout.tiles(tokens).numbers_t3.tolist() if tile[2]]
        assert sum(count for _, _, count in tiles) == tokens
        assert len(tiles) == sum(-(-new // TILE) for new in lengths) + (tokens > sum(lengths))
