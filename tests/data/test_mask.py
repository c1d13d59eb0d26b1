import numpy as np
import pytest

from tunefork.data.mask import extend_to_end_of_turn, mark, turn_end

ENDS = ("<e>", "<end>")


@pytest.mark.parametrize(
    ("text", "end"),
    [("hi<e>\n", 5), ("hi<e>", 5), ("hi\n", 3), ("<e>hi", 5), ("hi<e> <end>\n", 11)],
)
def test_turn_end_leaves_out_what_the_template_writes_after(text: str, end: int) -> None:
    assert turn_end(text, ENDS) == end


@pytest.mark.parametrize(
    ("text", "marked", "end"),
    [("hi<e>\nyo", 2, 5), ("hi\n<end>", 2, 8), ("hi<e>\nyo", 6, 5), ("hi yo", 2, 2)],
)
def test_marked_answers_reach_their_end_of_turn(text: str, marked: int, end: int) -> None:
    assert extend_to_end_of_turn(text, marked, ENDS) == end


def characters(texts: list[str]) -> list[list[int]]:
    return [[ord(character) for character in text] for text in texts]


def pairs(texts: list[str]) -> list[list[int]]:
    """Tokens of two characters, so that they break at even places only."""
    return [[hash(text[at : at + 2]) % 2**31 for at in range(0, len(text), 2)] for text in texts]


def test_marks_every_span_and_ends_with_the_last() -> None:
    marked = mark(characters, "qaaqqbbb\n", [(1, 3), (5, 8)])
    assert marked is not None
    assert marked.input_ids.tolist() == [ord(character) for character in "qaaqqbbb"]
    assert np.flatnonzero(marked.supervised).tolist() == [1, 2, 5, 6, 7]
    assert marked.prompt_length == 5
    assert marked.input_ids.dtype == np.int32


def test_the_last_prompt_is_tokenised_as_a_server_does() -> None:
    marked = mark(pairs, "qqqaaa", [(3, 6)])
    assert marked is not None
    assert marked.input_ids.tolist() == pairs(["qqq"])[0] + pairs(["aaa"])[0]
    assert marked.prompt_length == 2
    assert marked.supervised.tolist() == [False, False, True, True]


def test_an_earlier_answer_inside_a_token_is_refused() -> None:
    assert mark(pairs, "qaaaqqbb", [(1, 4), (6, 8)]) is None
    assert mark(pairs, "qqaaqqbb", [(2, 4), (6, 8)]) is not None


def test_after_puts_unsupervised_ids_in_front() -> None:
    marked = mark(characters, "qa", [(1, 2)])
    assert marked is not None
    longer = marked.after([1, 2])
    assert longer.input_ids.tolist() == [1, 2, ord("q"), ord("a")]
    assert longer.supervised.tolist() == [False, False, False, True]
    assert longer.prompt_length == 3
