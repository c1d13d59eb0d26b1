"""What a row becomes on its way to the model: Row -> Example -> Encoded.

A `Row` is a record of a file, an `Example` is a conversation or a text whatever the row's format
was, an `Encoded` is token ids with a mark on each token that is supervised. Each carries `source`,
the `file:line` it came from, so that every later complaint can name it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Row:
    """One record as its file holds it."""

    source: str
    """`train.jsonl:12` (lines from 1), `train.parquet:12` (rows from 1), `owner/name:train:12`."""
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Why a record cannot be used. `what` never holds the record's own text."""

    source: str
    what: str
    kind: str = "unreadable or incomplete"
    """What the report counts it as: this, `empty answer`, `wrong roles` or `broken unicode`."""

    def __str__(self) -> str:
        return f"{self.source}: {self.what}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation (`messages`) or a plain text (`text`): exactly one of the two."""

    source: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    label: str | None = None
    """Classification: the right answer, which is also the last message's content."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as the model sees it. L is its length in tokens."""

    source: str
    input_ids: NDArray[np.int32]
    """(L,)"""
    supervised: NDArray[np.bool_]
    """(L,) True where the token is a target: something the model must learn to produce."""
    prompt_length: int = 0
    """Tokens before the last supervised answer: what a server would send to the model. 0 for
    plain text."""
    answer: str | None = None
    """Text of that answer, the reference for generated answers."""
    label: str | None = None
