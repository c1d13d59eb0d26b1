"""Log probabilities of completions: offsets in the text, names of parts of characters."""

from collections.abc import Callable
from typing import Any

import pytest

from tunefork.serve.api.tokens import Offsets, completion_logprobs
from tunefork.serve.engine import TokenLogprob

TEXT = "héllo 😀 the fox 日本!"


@pytest.fixture(scope="module")
def tokens(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer()


def _entries(tokens: Any, ids: list[int]) -> list[TokenLogprob]:
    """Each with the two ids behind it as the next likeliest."""
    told = []
    for at, token in enumerate(ids):
        top = [(one, tokens.decode([one]), -1.0 - n) for n, one in enumerate(ids[at : at + 3])]
        told.append(TokenLogprob(token, tokens.decode([token]), -1.0, tuple(top)))
    return told


def test_offsets_are_those_of_the_text_however_it_is_parted(tokens: Any) -> None:
    ids = tokens(TEXT + "<|im_end|>a")["input_ids"]
    entries, text = _entries(tokens, ids), TEXT + "a"
    whole: Any = completion_logprobs(tokens, entries, 2, Offsets(tokens))
    offsets = Offsets(tokens)
    parted: list[Any] = [completion_logprobs(tokens, [one], 2, offsets) for one in entries]
    assert whole["text_offset"] == [part["text_offset"][0] for part in parted]
    told = zip(whole["tokens"], whole["text_offset"], strict=True)
    for name, at in told:
        if name.startswith("bytes:"):
            assert text[at] in "é😀日本"
        elif name != "<|im_end|>":
            assert text[at : at + len(name)] == name
    assert whole["text_offset"][-1] == len(TEXT)


def test_parts_of_characters_have_names_of_their_own(tokens: Any) -> None:
    ids = tokens("😀")["input_ids"]
    told: Any = completion_logprobs(tokens, _entries(tokens, ids), 3, Offsets(tokens))
    assert told["tokens"] == [f"bytes:\\x{byte:02x}" for byte in "😀".encode()]
    assert told["top_logprobs"][0] == dict(zip(told["tokens"][:3], (-1.0, -2.0, -3.0), strict=True))
    # Of two with one text the likelier is told.
    same = (TokenLogprob(5, "a", -1.0, ((5, "a", -1.0), (6, "a", -2.0))),)
    told = completion_logprobs(tokens, same, 2, Offsets(tokens))
    assert told["top_logprobs"] == [{"a": -1.0}]
