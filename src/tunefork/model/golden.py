"""Fixed conversations and texts, and the token ids that a tokenizer makes of them.

They stand for everything a tokenizer does by code rather than by its tables: normaliser,
pre-tokeniser, what it puts around a text, and the chat template. Those are described in many ways
that come to the same ids (and differ between releases of transformers), so it is the ids that
count. Changing anything here changes every fingerprint: raise `fingerprint_cache._FORMAT`.
"""

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from tunefork.data.chat import Renderer
from tunefork.data.example import Example, Message, RowProblem
from tunefork.errors import DataError
from tunefork.recipe import DataSection

_SYSTEM = Message("system", "You answer in one word.")
_ASK = Message("user", "What is the capital of France?")
_ANSWER = Message("assistant", "Paris")
_UNICODE = Message("user", "Größe: 10 µm\u00a0± 5\u202f%\n\t— 東京, नमस्ते, e\u0301 = é, 👩\u200d🚀?")
_EDGES = Message("user", "  leading, trailing and\r\n\n\nblank lines  \n")
_MORE = Message("assistant", "Yes.\n\n```python\nprint(1_000 + 23)\n```")

CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (_ASK,),
    (_SYSTEM, _ASK),
    (_ASK, _ANSWER),
    (_SYSTEM, _ASK, _ANSWER, _UNICODE, _MORE),
    (_UNICODE, _MORE, _EDGES),
    (_EDGES, _ANSWER, _ASK, _ANSWER),
)
"""With and without a system turn, of one turn and several, ending in a question or an answer."""


_TEXTS = (
    "0 12 123 1234 12345 123456 1234567 12345678 3.14 1,000,000 007 1e-5 10% v2.0",
    "don't I'll WE'RE they'd camelCase PascalCase snake_case UPPER lower x86_64 naïve Straße",
    "...!!!???--- <<>> [[]] {{}} (()) ``'' && || == => :: // ** ## $$ @@ ~~ \\\\",
    "if x:\n    y = [1, 2]\n\treturn\r\n\n\n   \n a  b   c    d",
    "https://example.org/a?b=c&d=%20 me@example.org /usr/bin/env #tag",
    "\ufb01 \u2460 \u00b2 \u00bd A\u030a \u212b \uff41\uff42\uff43 \uff11\uff12\uff13"
    " \uff76\uff9e \u1100\u1161 \uac01 \u0e44\u0e17\u0e22"
    " \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea"
    " \u4f60\u597d\uff0c\u4e16\u754c\u3002",
)
"""Numbers, contractions, case, punctuation, code, addresses, and what normal forms change."""


def conversation_ids(tokenizer: Any) -> list[list[int] | None]:
    """Ids of each golden conversation as tunefork renders it; None where the template refuses it.

    One that ends with an answer is rendered whole, the others as a prompt for the next answer.
    """
    renderer = Renderer(Undated(tokenizer), DataSection(train="-", template="chat"))
    return [_ids(renderer, messages) for messages in CONVERSATIONS]


def text_ids(tokenizer: Any) -> list[list[int]]:
    """Ids of fixed texts, of what the tokenizer puts around one, and of every character."""
    closed: list[list[int]] = tokenizer(["", "a"], verbose=False)["input_ids"]
    texts = [message.content for turns in CONVERSATIONS for message in turns]
    texts += [*_TEXTS, *_alphabet()]
    bare: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return closed + bare


def _ids(renderer: Renderer, messages: Sequence[Message]) -> list[int] | None:
    if messages[-1].role != "assistant":
        try:
            return renderer.prompt_ids(messages)
        except DataError:
            return None
    encoded = renderer.attempt(Example("golden", messages=tuple(messages)))
    return None if isinstance(encoded, RowProblem) else encoded.input_ids.tolist()


@cache
def _alphabet() -> tuple[str, ...]:
    """Every character that Unicode 3.2 has below its ideographs, between letters and digits.

    Of that old version, because what later ones add is classified by whichever tables a release of
    the tokenizers library was built with.
    """
    return tuple(_lines())


def _lines() -> Iterator[str]:
    old, size = unicodedata.ucd_3_2_0, 64
    for first in range(0, min(0x3400, sys.maxunicode), size):
        known = [c for n in range(first, first + size) if old.category(c := chr(n)) != "Cn"]
        if known:
            yield "".join(f"a{c}B {c}1" for c in known)


class Undated:
    """A tokenizer whose chat template finds the same date every day (Llama 3's writes today's)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer(*args, **options)

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        """As the tokenizer's, in July 2024."""
        return self._tokenizer.apply_chat_template(
            *args, strftime_now=lambda _format: "26 Jul 2024", **options
        )
