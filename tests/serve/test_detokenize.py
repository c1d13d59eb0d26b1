"""The pieces put together are the text, whole characters at a time, up to a stop text."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.decoders import Fuse, Replace, Strip
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tunefork.serve.detokenize import Detokenizer
from tunefork.serve.token_text import text_of

TEXT = "héllo wörld 😀 the quick 日本 brown fox"


@pytest.fixture(scope="module")
def tokens(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer()


def _pieces(tokens: Any, ids: list[int], prompt: list[int], stop: tuple[str, ...] = ()) -> Any:
    detokenizer = Detokenizer(tokens, prompt, stop)
    pieces = [detokenizer.push([token]) for token in ids]
    return [*pieces, detokenizer.flush()], detokenizer.stopped


def test_pieces_are_whole_characters_and_make_up_the_text(tokens: Any) -> None:
    pieces, stopped = _pieces(tokens, tokens(TEXT)["input_ids"], [5, 6])
    assert "".join(pieces) == TEXT
    assert not any("�" in piece for piece in pieces) and not stopped
    assert "😀" in pieces and len([piece for piece in pieces if piece]) > 15


def test_any_bytes_become_what_decode_makes_of_them(tokens: Any) -> None:
    random.seed(0)
    for _ in range(100):
        ids = [random.randrange(len(tokens)) for _ in range(40)]
        pieces, _ = _pieces(tokens, ids, [random.randrange(60, 80)])
        assert "".join(pieces) == tokens.decode(ids, skip_special_tokens=True)


def test_a_text_that_ends_inside_a_character_is_completed_at_the_end(tokens: Any) -> None:
    ids = tokens("ab😀")["input_ids"][:-1]
    pieces, _ = _pieces(tokens, ids, [])
    assert pieces[:2] == ["a", "b"] and pieces[-1].startswith("�")


def test_special_tokens_have_no_text(tokens: Any) -> None:
    pieces, _ = _pieces(tokens, [*tokens("ab<|im_end|>c")["input_ids"]], [])
    assert "".join(pieces) == "abc"


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (("quick",), "héllo wörld 😀 the "),
        (("zzz", "ld 😀"), "héllo wör"),
        (("fox!",), TEXT),
        (("h",), ""),
        (("o w", "llo"), "hé"),
    ],
)
def test_nothing_of_a_stop_text_is_shown(tokens: Any, stop: tuple[str, ...], shown: str) -> None:
    pieces, stopped = _pieces(tokens, tokens(TEXT)["input_ids"], [], stop)
    assert "".join(pieces) == shown
    assert stopped == (shown != TEXT)


def test_what_cannot_begin_a_stop_text_is_shown_at_once(tokens: Any) -> None:
    detokenizer = Detokenizer(tokens, [], ("dog",))
    shown = [detokenizer.push(tokens(text)["input_ids"]) for text in ("a d", "o", "t")]
    assert shown == ["a ", "", "dot"]


def test_a_word_keeps_the_space_before_it(tokens: Any) -> None:
    both = tokens("the quick brown")["input_ids"]
    pieces, _ = _pieces(tokens, both[1:], both[:1])
    assert "".join(pieces) == " quick brown"


def test_a_replacement_character_of_the_prompt_is_no_part_of_the_answer(tokens: Any) -> None:
    """One that somebody has written; what a prompt leaves open is completed."""
    for prompt, answer in (("ab�", "cd"), ("�", "é"), ("�a", "b")):
        ids = tokens(prompt + answer)["input_ids"]
        begin = len(tokens(prompt)["input_ids"])
        pieces, _ = _pieces(tokens, ids[begin:], ids[:begin])
        assert "".join(pieces) == answer
    ids = tokens("a😀")["input_ids"]
    assert "".join(_pieces(tokens, ids[3:], ids[:3])[0]) == "😀"


def test_a_token_keeps_the_space_that_it_begins_with() -> None:
    words = ["▁the", "the", "▁", "▁▁", "."]
    backend = Tokenizer(BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
    parts = [Replace("▁", " "), Fuse(), Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode([0]) == "the"
    texts = [text_of(tokenizer, token) for token in range(len(words))]
    assert texts == [" the", "the", " ", "  ", "."]
