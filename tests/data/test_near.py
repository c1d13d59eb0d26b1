"""Near duplicates: exactly those that brute force finds, whatever the order."""

import numpy as np
import pytest

from tunefork.data.near import find_near, words

Pairs = dict[tuple[int, int], float]


def _texts(seed: int, count: int = 120) -> list[str]:
    """Texts in families: each a variation of one of a few, some words changed."""
    draw = np.random.default_rng(seed)
    families = [draw.integers(0, 400, size=draw.integers(2, 40)) for _ in range(12)]
    texts = []
    for _ in range(count):
        numbers = families[draw.integers(len(families))].copy()
        for place in draw.integers(0, len(numbers), size=draw.integers(0, 4)):
            numbers[place] = draw.integers(400)
        texts.append(" ".join(f"w{number}" for number in numbers))
    return texts


def _found(texts: list[str], threshold: float) -> Pairs:
    near = find_near(texts, threshold)
    return {
        (a, b): near.like(a)[near.group[b]]
        for a in range(len(texts))
        for b in range(len(texts))
        if a != b and near.group[b] in near.like(a)
    }


def _by_brute_force(texts: list[str], threshold: float) -> Pairs:
    sets = []
    for text in texts:
        found = words(text)
        found += [""] * (3 - len(found))
        sets.append({tuple(found[at : at + 3]) for at in range(len(found) - 2)})
    pairs = {}
    for a, one in enumerate(sets):
        for b, other in enumerate(sets):
            similarity = len(one & other) / len(one | other)
            if a != b and similarity >= threshold:
                pairs[a, b] = similarity
    return pairs


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_what_brute_force_finds(
    seed: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunefork.data.near.MIN_TEMPLATE_TEXTS", 1000)
    monkeypatch.setattr("tunefork.data.near._CHUNK", 7)
    texts = _texts(seed)
    expected = _by_brute_force(texts, threshold)
    assert len(expected) > 20
    assert _found(texts, threshold) == pytest.approx(expected)


def test_symmetric_and_in_any_order() -> None:
    texts = _texts(7)
    found = _found(texts, 0.6)
    assert found and all(found[b, a] == similarity for (a, b), similarity in found.items())
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    moved = _found([texts[index] for index in order], 0.6)
    assert {(order[a], order[b]): similarity for (a, b), similarity in moved.items()} == found


LONG = (
    "the resource was not found in this region so check that its name is right and that you may "
    "read it before you try again with another role or account of yours"
)


@pytest.mark.parametrize(
    ("one", "other", "is_near"),
    [
        ("Close my account.", "close my  account", True),
        ("close my account", "close my ticket", False),
        ("yes", "no", False),
        ("please tell me how to close an account", "please tell me how to open an account", False),
        (LONG, LONG.replace("region", "zone"), True),
        (LONG, LONG.replace("region", "zone").replace("account", "bucket"), False),
        (LONG, " ".join(reversed(LONG.split())), False),
        ("我想取消我的订单并退款到原来的信用卡", "我想取消我的订单并退款到原来的信用卡。", True),
        ("我想取消我的订单并退款到原来的信用卡", "你们的商店周末几点开门营业呢请告诉我", False),
        ("!?", "...", False),
        ("", "", False),
    ],
)
def test_short_texts_must_be_equal_and_long_ones_may_differ_a_little(
    one: str, other: str, is_near: bool
) -> None:
    assert ((0, 1) in _found([one, other], 0.8)) is is_near


def test_an_instruction_before_every_row_makes_none_alike() -> None:
    head = "write the one line synopsis for this package and keep it short and plain please: "
    texts = [f"{head} a{n} b{n} c{n} d{n}" for n in range(200)]
    assert _found(texts, 0.5) == {}
    assert (0, 200) in _found([*texts, f"{head} a0 b0 c0 d0!"], 0.5)


def test_copies_without_end_are_no_pairs_without_end() -> None:
    near = find_near(["one two three four"] * 5000 + ["five six seven"], 0.8)
    assert near.neighbours == {} and len(set(near.group)) == 2


def test_a_part_just_at_the_threshold() -> None:
    """8 runs of 10, and the two that only one text has are the rarest: the filter's worst case."""
    numbers = [f"n{n}" for n in range(12)]
    found = _found([" ".join(numbers), " ".join(numbers[2:])], 0.8)
    assert found == {(0, 1): 0.8, (1, 0): 0.8}


def test_no_texts() -> None:
    assert find_near([], 0.8).group == []
