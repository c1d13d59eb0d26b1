"""Sequences are made to fit `max_length`: refused, cut or dropped, and plain text split.

A text is split into consecutive windows that together hold every token of it. The first token of
a window is context only, for nothing precedes it, so a window always has at least two tokens.
"""

from dataclasses import replace

from tunefork.data.example import Encoded, RowProblem


def windows(encoded: Encoded, max_length: int) -> list[Encoded]:
    """Split a text of L tokens into windows of `max_length`, the last one shorter."""
    length = len(encoded.input_ids)
    starts = list(range(0, length, max_length))
    if length - starts[-1] == 1 and len(starts) > 1:
        starts[-1] -= 1
    ends = [*starts[1:], length]
    pieces = []
    for start, end in zip(starts, ends, strict=True):
        supervised = encoded.supervised[start:end].copy()
        supervised[0] = False
        piece = replace(encoded, input_ids=encoded.input_ids[start:end], supervised=supervised)
        pieces.append(piece)
    return pieces


def too_long(encoded: Encoded, max_length: int) -> RowProblem:
    """What to say of a conversation that is over `max_length`."""
    found = f"has {len(encoded.input_ids)} tokens, data.max_length is {max_length}"
    return RowProblem(encoded.source, found)


def cut(encoded: Encoded, max_length: int) -> Encoded | None:
    """The first `max_length` tokens, or None where none of them would be supervised.

    Where the last answer is cut away whole, so are `prompt_length` and `answer`.
    """
    supervised = encoded.supervised[:max_length]
    if not supervised.any():
        return None
    ids = encoded.input_ids[:max_length]
    if encoded.prompt_length < max_length:
        return replace(encoded, input_ids=ids, supervised=supervised)
    return replace(encoded, input_ids=ids, supervised=supervised, prompt_length=0, answer=None)
