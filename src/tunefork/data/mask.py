"""Which tokens of a conversation are supervised: the ones that a server's model would generate.

A chat template is a program that prints text; most do not say which of it is the assistant's. The
definition used here needs no mark: for the assistant turn i, the server would send the prompt
P_i = render(turns before i, add_generation_prompt=True), so whatever the rendered conversation T
has after P_i, up to the end of turn i, is what the model has to produce. That holds only where P_i
is a prefix of T, in text and in tokens, and both are checked on every row. A template that writes
something else before an answer when training than when serving is thereby found out, not learnt.

The end of turn i is the end of render(turns to i), or, where the template has `{% generation %}`
marks (https://huggingface.co/docs/transformers/chat_templating_writing), the end of the marked
text. Either way it is moved to the end-of-turn token: a newline that the template writes after it
is never generated, and without it the model would never learn to stop. Tokens are told apart by
position and never by id, so a tokenizer whose pad is its end-of-turn token loses nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]
"""Characters [start, end) of a rendered conversation."""


@dataclass(frozen=True, slots=True)
class Marked:
    """Token ids of a conversation up to its last supervised token. L is their number."""

    input_ids: NDArray[np.int32]
    """(L,)"""
    supervised: NDArray[np.bool_]
    """(L,)"""
    prompt_length: int
    """Tokens before the last span."""

    def after(self, ids: list[int]) -> "Marked":
        """The same with `ids`, unsupervised, in front."""
        return Marked(
            np.concatenate([np.array(ids, dtype=np.int32), self.input_ids]),
            np.concatenate([np.zeros(len(ids), dtype=np.bool_), self.supervised]),
            len(ids) + self.prompt_length,
        )


def turn_end(text: str, end_of_turn: tuple[str, ...]) -> int:
    """Where the turn that ends `text` is over: after its token of `end_of_turn`, if it has one.

    A template without such a token ends its turns with white space at most, and that has to serve.
    """
    body = text.rstrip()
    return len(body) if body.endswith(end_of_turn) else len(text)


def extend_to_end_of_turn(text: str, end: int, end_of_turn: tuple[str, ...]) -> int:
    """Move the `end` of a marked answer behind the end-of-turn token that follows it, if any."""
    if text[:end].rstrip().endswith(end_of_turn):
        return turn_end(text[:end], end_of_turn)
    rest = text[end:].lstrip()
    following = [token for token in end_of_turn if rest.startswith(token)]
    return len(text) - len(rest) + len(max(following, key=len)) if following else end


def mark(
    tokenize: Callable[[list[str]], list[list[int]]], text: str, spans: Sequence[Span]
) -> Marked | None:
    """Tokenise `text` up to the end of its last span and mark the tokens of every span.

    `tokenize` turns texts into ids without adding any. Tokens must break at every span's start,
    because that is where a server's prompt ends; None where they do not. At the last start they
    are made to: prompt and answer are then tokenised apart, as they are when serving.
    """
    last_start, last_end = spans[-1]
    cuts = [cut for span in spans[:-1] for cut in span]
    ids, prompt, *prefixes = tokenize(
        [text[:last_end], text[:last_start], *(text[:cut] for cut in cuts)]
    )
    if ids[: len(prompt)] != prompt:
        ids = prompt + tokenize([text[last_start:last_end]])[0]
    if any(ids[: len(prefix)] != prefix for prefix in prefixes):
        return None
    supervised = np.zeros(len(ids), dtype=np.bool_)
    bounds = [len(prefix) for prefix in prefixes] + [len(prompt), len(ids)]
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        supervised[start:end] = True
    return Marked(np.array(ids, dtype=np.int32), supervised, len(prompt))
