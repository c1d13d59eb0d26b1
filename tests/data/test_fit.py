import numpy as np
import pytest

from tunefork.data.example import Encoded
from tunefork.data.fit import cut, too_long, windows


def text_of(length: int) -> Encoded:
    return Encoded("f:1", np.arange(length, dtype=np.int32), np.arange(length) > 0)


@pytest.mark.parametrize("length", [2, 7, 8, 9, 10, 16, 17, 100])
def test_windows_lose_no_token(length: int) -> None:
    pieces = windows(text_of(length), 8)
    assert np.concatenate([piece.input_ids for piece in pieces]).tolist() == list(range(length))
    for piece in pieces:
        assert 2 <= len(piece.input_ids) <= 8
        assert piece.supervised.tolist() == [False] + [True] * (len(piece.input_ids) - 1)
    assert len(pieces) == -(-length // 8)


def conversation(supervised: str, prompt_length: int) -> Encoded:
    marks = np.array([mark == "x" for mark in supervised])
    ids = np.arange(len(marks), dtype=np.int32)
    return Encoded("f:1", ids, marks, prompt_length=prompt_length, answer="secret")


def test_cut_keeps_what_is_still_supervised() -> None:
    shorter = cut(conversation("..xx..xx", 6), 7)
    assert shorter is not None
    assert shorter.input_ids.tolist() == list(range(7))
    assert (shorter.prompt_length, shorter.answer) == (6, "secret")
    without_last = cut(conversation("..xx..xx", 6), 6)
    assert without_last is not None
    assert (without_last.prompt_length, without_last.answer) == (0, None)
    assert cut(conversation("....xxxx", 4), 4) is None


def test_too_long_says_how_long() -> None:
    assert str(too_long(text_of(9), 8)) == "f:1: has 9 tokens, data.max_length is 8"
