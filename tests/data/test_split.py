import numpy as np
import pytest

import tunefork.data.split as split_module
from tunefork.data.example import Encoded, Example, Message
from tunefork.data.split import (
    content_key,
    epoch_order,
    held_out,
    prompt_key,
    steps,
    subset,
    validation_split,
)
from tunefork.errors import DataError


def conversation(question: str, answer: str) -> Example:
    return Example("f:1", messages=(Message("user", question), Message("assistant", answer)))


def test_keys_forgive_white_space_only() -> None:
    key = content_key(conversation("a  b\n", "c"))
    assert key == content_key(conversation(" a b", "c "))
    assert key != content_key(conversation("ab", "c"))
    assert key != content_key(conversation("a b", "d"))
    assert prompt_key(conversation("a b", "c")) == prompt_key(conversation("a  b", "d"))
    assert content_key(Example("f:1", text="a b")) != content_key(Example("f:1", text="a c"))


def test_held_out_is_by_content_not_by_place() -> None:
    keys = [bytes([value]) for value in (5, 3, 9, 1, 3, 7, 8, 2, 4, 6)]
    marks = held_out(keys, 0.2)
    assert {key for key, mark in zip(keys, marks, strict=True) if mark} == {b"\x01", b"\x02"}
    assert held_out(keys[::-1], 0.2) == marks[::-1]
    assert sum(held_out(keys, 0.001)) == 1
    assert not any(held_out(keys, 0.0))
    copies = held_out(keys, 0.3)
    assert copies[1] and copies[4]


def encoded(ids: list[int]) -> Encoded:
    return Encoded("f:1", np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))


def test_validation_split() -> None:
    examples = [encoded([value, value]) for value in range(50)] + [encoded([7, 7])]
    rest, validation = validation_split(examples, 0.2, seed=0)
    assert len(validation) in (10, 11)
    assert len(rest) + len(validation) == 51
    assert not {e.input_ids.tobytes() for e in rest} & {e.input_ids.tobytes() for e in validation}
    again = validation_split(examples, 0.2, seed=0)[1]
    assert [id(example) for example in again] == [id(example) for example in validation]
    other = validation_split(examples, 0.2, seed=1)[1]
    assert [id(example) for example in other] != [id(example) for example in validation]
    with pytest.raises(DataError, match=r"too few to cut a validation share of 0\.2"):
        validation_split([encoded([1]), encoded([1])], 0.2, seed=0)


def test_subset_grows_without_reshuffling() -> None:
    small, large = subset(100, 10, 0, 1), subset(100, 20, 0, 1)
    assert len(small) == 10 and small == sorted(set(small))
    assert set(small) < set(large)
    assert subset(100, 10, 1, 1) != small
    assert subset(100, 10, 0, 2) != small
    assert subset(5, None, 0, 1) == subset(5, 9, 0, 1) == [0, 1, 2, 3, 4]


def test_epoch_order_is_a_permutation_of_its_own() -> None:
    orders = [epoch_order(20, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(20, 0, 1) == orders[1]


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def test_steps_cover_each_epoch_and_keep_the_short_batch() -> None:
    batches = steps(10, batch_size=4, epochs=2.0, max_steps=None, seed=3)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    assert flat(batches[:3]) == epoch_order(10, 3, 0)
    assert flat(batches[3:]) == epoch_order(10, 3, 1)
    cut_short = steps(10, batch_size=4, epochs=1.5, max_steps=None, seed=3)
    assert cut_short[:3] == batches[:3]
    assert flat(cut_short[3:]) == epoch_order(10, 3, 1)[:5]
    assert steps(10, batch_size=4, epochs=2.0, max_steps=2, seed=3) == batches[:2]
    assert steps(10, batch_size=4, epochs=0.01, max_steps=None, seed=3) == [[batches[0][0]]]


@pytest.mark.parametrize(("max_steps", "shuffled"), [(1, 1), (3, 1), (4, 2), (None, 3000)])
def test_no_epoch_is_shuffled_that_max_steps_leaves_out(
    monkeypatch: pytest.MonkeyPatch, max_steps: int | None, shuffled: int
) -> None:
    epochs: list[int] = []

    def order(n: int, seed: int, epoch: int) -> list[int]:
        epochs.append(epoch)
        return list(range(n))

    monkeypatch.setattr(split_module, "epoch_order", order)
    batches = steps(10, batch_size=4, epochs=3000, max_steps=max_steps, seed=3)
    assert len(batches) == (max_steps or 9000) and len(epochs) == shuffled
