import numpy as np
import pytest
import torch

from tunefork.data.example import Encoded
from tunefork.data.pack import ROW_LENGTH, MicroBatch, pack


def random_examples(lengths: list[int], seed: int = 0, vocabulary: int = 64) -> list[Encoded]:
    random = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        supervised = random.random(length) < 0.6
        supervised[-1] = True
        ids = random.integers(3, vocabulary, length).astype(np.int32)
        examples.append(Encoded("f:1", ids, supervised))
    return examples


LENGTHS = [9, 12, 3, 1, 2, 7, 20, 5, 2, 1, 14, 20]


def test_layout_by_hand() -> None:
    examples = [
        Encoded("f:1", np.array([10, 11, 12], np.int32), np.array([False, True, True])),
        Encoded("f:2", np.array([20, 21], np.int32), np.array([False, True])),
        Encoded("f:3", np.array([30, 31, 32, 33], np.int32), np.array([True, False, True, False])),
    ]
    (batch,) = pack(examples, max_tokens=12, packing=True, row_length=6, pad_id=9)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21], [30, 31, 32, 33, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.example.tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, -1]]
    assert batch.targets.tolist() == [
        [11, 12, -100, 21, -100],
        [-100, 32, -100, -100, -100],
    ]
    assert batch.labels.tolist() == [11, 12, 21, 32]
    assert batch.segments.starts.tolist() == [0, 3, 5, 9, 10]
    assert batch.segments.starts.dtype == torch.int32
    assert (batch.segments.longest, batch.segments.is_uniform) == (4, False)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("max_tokens", [20, 47, 64, 1000])
def test_nothing_is_lost_or_repeated(packing: bool, max_tokens: int) -> None:
    examples = random_examples(LENGTHS)
    batches = pack(examples, max_tokens=max_tokens, packing=packing)
    seen = []
    for batch in batches:
        assert batch.input_ids.numel() <= max_tokens
        assert all(t.dtype == torch.int64 for t in (batch.input_ids, batch.targets, batch.example))
        for at in set(batch.example.flatten().tolist()):
            if at < 0:
                continue
            row, columns = (batch.example == at).nonzero(as_tuple=True)
            assert len(set(row.tolist())) == 1
            ids, supervised = examples[at].input_ids, examples[at].supervised
            assert batch.input_ids[row, columns].tolist() == ids.tolist()
            assert batch.position_ids[row, columns].tolist() == list(range(len(ids)))
            targets = batch.targets[row, columns].tolist()
            expected = [
                int(token) if learn else -100
                for token, learn in zip(ids[1:], supervised[1:], strict=True)
            ]
            assert targets == [*expected, -100]
            seen.append(at)
        assert (batch.targets[batch.example < 0] == -100).all()
    assert sorted(seen) == list(range(len(examples)))


def test_packing_leaves_little_padding() -> None:
    examples = random_examples(np.random.default_rng(1).integers(5, 100, 400).tolist())
    used = sum(len(example.input_ids) for example in examples)

    def padded(batches: list[MicroBatch]) -> int:
        return sum(batch.input_ids.numel() for batch in batches)

    packed = pack(examples, max_tokens=4096, packing=True)
    assert padded(packed) < 1.02 * used
    assert max(batch.input_ids.shape[1] for batch in packed) <= ROW_LENGTH
    one_step = pack(examples[:8], max_tokens=4096, packing=True)
    assert padded(one_step) < 1.02 * sum(len(example.input_ids) for example in examples[:8])
    assert padded(pack(examples, max_tokens=4096, packing=False)) < 1.25 * used


def test_same_examples_same_batches() -> None:
    examples = random_examples(LENGTHS)
    first, second = (pack(examples, max_tokens=40, packing=True) for _ in range(2))
    assert all(
        torch.equal(a.example, b.example) and torch.equal(a.input_ids, b.input_ids)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize(
    ("lengths", "packing", "is_uniform"),
    [([6, 6], False, True), ([6, 6], True, True), ([6, 5], False, False), ([3, 3, 6], True, False)],
)
def test_rows_of_one_segment(lengths: list[int], packing: bool, is_uniform: bool) -> None:
    (batch,) = pack(random_examples(lengths), max_tokens=12, packing=packing, row_length=6)
    assert batch.segments.is_uniform == is_uniform


@pytest.mark.parametrize("packing", [False, True])
def test_segments_restart_where_positions_do(packing: bool) -> None:
    for batch in pack(random_examples(LENGTHS), max_tokens=47, packing=packing):
        starts = (batch.position_ids.flatten() == 0).nonzero()[:, 0].tolist()
        assert batch.segments.starts.tolist() == [*starts, batch.input_ids.numel()]
        assert batch.segments.longest == int(batch.position_ids.max()) + 1
        assert batch.labels.tolist() == batch.targets[batch.supervised].tolist()


def test_limits() -> None:
    assert pack([], max_tokens=8, packing=True) == []
    examples = random_examples([9])
    for limits in ({"max_tokens": 8}, {"max_tokens": 16, "row_length": 8}):
        with pytest.raises(ValueError, match="an example has 9 tokens"):
            pack(examples, packing=True, **limits)
