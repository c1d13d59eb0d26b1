"""Batches of few sizes: how few, and what they are filled with."""

import numpy as np
import pytest
import torch

from tests.data.test_pack import LENGTHS, random_examples
from tunefork.data.bucket import WHOLE_ROWS, bucket, flattened, limit, padded, size_of
from tunefork.data.pack import MicroBatch, pack


def test_few_sizes_and_little_filling() -> None:
    sizes = [bucket(count) for count in range(1, 20_000)]
    assert all(size % 64 == 0 and size - n >= 0 for n, size in enumerate(sizes, start=1))
    assert all(size - n < max(64, n / 8) for n, size in enumerate(sizes, start=1))
    for octave in range(6, 14):
        between = {size for size in sizes if 2**octave < size <= 2 ** (octave + 1)}
        assert 1 <= len(between) <= 8
    assert [bucket(n, multiple=8) for n in (0, 1, 8, 9, 17, 130)] == [8, 8, 8, 16, 24, 144]
    assert [bucket(n) for n in (1, 64, 65, 1024, 1025, 9000)] == [64, 64, 128, 1024, 1152, 9216]


def test_limit() -> None:
    assert [limit(n) for n in (1, 128, 129, 2048, 2049)] == [128, 128, 256, 2048, 4096]


def _batch(lengths: list[int], row_length: int | None = None, seed: int = 0) -> MicroBatch:
    (batch,) = pack(
        random_examples(lengths, seed), max_tokens=10**5, packing=True, row_length=row_length
    )
    return batch


@pytest.mark.parametrize("lengths", [LENGTHS, [3], [250, 100, 9], [130] * 9, [64]])
def test_padded(lengths: list[int]) -> None:
    batch = _batch(lengths, row_length=256)
    size = size_of(batch)
    full = padded(batch, size)
    assert size.longest >= max(lengths)
    assert full.input_ids.shape == full.position_ids.shape == (size.rows, size.length)
    assert full.targets.shape == full.example.shape == (size.rows, size.length)
    assert len(full.labels) == len(full.supervised[0]) == len(full.supervised[1])
    assert len(full.labels) == size.supervised
    assert len(full.segments.starts) == size.segments + 1
    # The batch itself is still there, in front.
    used, count = batch.input_ids.numel(), len(batch.labels)
    for name in ("input_ids", "position_ids", "targets", "example"):
        was, now = getattr(batch, name).flatten(), getattr(full, name).flatten()
        assert torch.equal(now[:used], was)
    assert torch.equal(full.labels[:count], batch.labels)
    rows, columns = full.supervised
    assert torch.equal(full.targets[rows[:count], columns[:count]], batch.labels)
    ends = batch.segments.starts
    assert torch.equal(full.segments.starts[: len(ends)], ends)
    # The rest is padding, in segments no longer than a kernel is told.
    assert (full.labels[count:] == -100).all()
    assert (full.example.flatten()[used:] == -1).all()
    assert (full.targets.flatten()[used:] == -100).all()
    lengths_e = full.segments.starts.diff()
    assert int(full.segments.starts[-1]) == full.input_ids.numel()
    assert int(lengths_e.min()) >= 0 and int(lengths_e.max()) <= size.longest
    starts = full.segments.starts[:-1][lengths_e > 0].long()
    restarts = (full.position_ids.flatten() == 0).nonzero()[:, 0]
    assert torch.equal(starts, restarts)


def test_uniform_rows_stay_rows() -> None:
    batch = _batch([WHOLE_ROWS] * 3, row_length=WHOLE_ROWS)
    size = size_of(batch)
    assert (size.rows, size.length, size.segments) == (3, WHOLE_ROWS, 3)
    assert size.is_uniform and padded(batch, size).segments.is_uniform
    by_chance = size_of(_batch([100] * 3, row_length=100))
    assert (by_chance.rows, by_chance.length, by_chance.is_uniform) == (1, 320, False)


def test_many_batches_few_sizes() -> None:
    draw = np.random.default_rng(0)
    batches = [_batch(draw.integers(10, 120, 32).tolist(), seed=seed) for seed in range(40)]
    assert len({tuple(batch.input_ids.shape) for batch in batches}) > 20
    sizes = {size_of(batch) for batch in batches}
    assert len({(size.length, size.segments, size.longest) for size in sizes}) <= 8


def test_what_does_not_fit() -> None:
    small, large = _batch([9, 9]), _batch([200, 90, 90])
    with pytest.raises(ValueError, match="400 tokens in 4 segments of up to 200"):
        padded(large, size_of(small))
    with pytest.raises(ValueError, match="is not of"):
        padded(small, size_of(_batch([WHOLE_ROWS] * 2, row_length=WHOLE_ROWS)))


def test_flattened() -> None:
    batch = _batch(LENGTHS, row_length=32)
    assert batch.input_ids.shape[0] > 1
    flat = flattened(batch)
    assert flat.input_ids.shape == (1, batch.input_ids.numel())
    assert torch.equal(flat.targets[flat.supervised], batch.labels)
    assert torch.equal(flat.segments.starts, batch.segments.starts)
    rows = _batch([WHOLE_ROWS] * 2, row_length=WHOLE_ROWS)
    assert rows.segments.is_uniform and not flattened(rows).segments.is_uniform
