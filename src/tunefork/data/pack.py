"""Examples of many lengths become rectangles of tokens, with nothing leaking between them.

Every example lies whole in one row. Where several share a row, positions restart at each, and
transformers derives from them, given no attention mask, that a token sees its own example only
(`find_packed_sequence_indices` in transformers/masking_utils.py). Padding is one more such segment.

Rows are filled evenly, because padding costs as much as tokens do: the longest example left goes
into the row that is least full (longest processing time first; Graham 1969,
https://doi.org/10.1137/0117039), in the fewest rows for which that fits. On the demo's steps of 8
examples a fifth of the tokens was padding when rows were as long as the longest example was; so
filled, 1 % is.

A GPU is told the same without a mask, by where each segment starts (`Segments`).

Shape legend: R rows, T tokens of a row, S supervised tokens, E segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from tunefork.data.example import Encoded
from tunefork.data.slots import Slots

IGNORED = -100
"""Target of a position after which nothing supervised follows."""

ROW_LENGTH = 256
"""Rows are filled up to this many tokens: long enough to leave little padding, short enough that
attention, which costs a row's length squared, stays a small part of a step."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Which tokens may see each other, over the R * T positions of the flattened rows.

    A segment is one example or the padding that ends a row, so none reaches over a row's end.
    """

    starts: Tensor
    """(E + 1,) int32, from 0 to R * T: flash attention's cumulative lengths. A segment may be
    empty."""
    longest: int
    """Most tokens of a segment, or more."""
    is_uniform: bool
    """Every row is exactly one segment."""

    @classmethod
    def of(cls, lengths: Sequence[int], *, rows: int) -> Self:
        """Segments of these lengths, in order, over so many rows."""
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(starts, max(lengths), is_uniform=len(lengths) == rows)

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return replace(self, starts=self.starts.to(device))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass takes: call the model with `input_ids`, `position_ids`, and no mask or
    the `segments` in its place (`model.head`)."""

    input_ids: Tensor
    """(R, T) int64"""
    position_ids: Tensor
    """(R, T) int64, from 0 at each example and at the padding."""
    targets: Tensor
    """(R, T) int64, the token that follows `input_ids[r, t]` in its example where that one is
    supervised, else -100. Shifted already."""
    example: Tensor
    """(R, T) int64, index into the examples given to `pack`; -1 for padding."""
    supervised: tuple[Tensor, Tensor]
    """Rows and columns, each (S,) int64, of the S supervised targets in row-major order. Found here
    and not where they are used, because on a GPU the search would wait for all work before it."""
    labels: Tensor
    """(S,) int64, the targets at the supervised places. -100 at places that only fill up a batch of
    fixed size (`bucket.py`): no loss, no gradient."""
    segments: Segments
    slots: Slots | None = None
    """Where many adapters share the pass."""

    def pinned(self) -> Self:
        """The same in memory that a GPU reads without the host waiting for what runs on it."""
        rows, columns = self.supervised
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            position_ids=self.position_ids.pin_memory(),
            supervised=(rows.pin_memory(), columns.pin_memory()),
            labels=self.labels.pin_memory(),
            segments=replace(self.segments, starts=self.segments.starts.pin_memory()),
            slots=self.slots and self.slots.pinned(),
        )

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        rows, columns = self.supervised
        return type(self)(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.targets.to(device),
            self.example.to(device),
            (rows.to(device), columns.to(device)),
            self.labels.to(device),
            self.segments.to(device),
            None if self.slots is None else self.slots.to(device),
        )


def pack(
    examples: Sequence[Encoded],
    *,
    max_tokens: int,
    packing: bool,
    row_length: int | None = None,
    pad_id: int = 0,
) -> list[MicroBatch]:
    """Lay `examples` out in micro-batches of at most `max_tokens` tokens, padding included.

    Without `packing` a row holds one example; with it, as many as fit in `row_length` tokens (by
    default `ROW_LENGTH`, or the longest example's length where that is more). The same examples
    give the same micro-batches. Raises ValueError where an example is longer than either limit.
    """
    lengths = [len(example.input_ids) for example in examples]
    return [
        lay_out(examples, rows, width, pad_id)
        for rows, width in arrange(
            lengths, max_tokens=max_tokens, packing=packing, row_length=row_length
        )
    ]


def arrange(
    lengths: Sequence[int], *, max_tokens: int, packing: bool, row_length: int | None = None
) -> list[tuple[list[list[int]], int]]:
    """The micro-batches that `pack` makes of examples so long, without their tokens: each one's
    rows, as indices of the examples in them, and its width. Raises as `pack` does."""
    longest = max(lengths, default=0)
    row_length = row_length or min(max(longest, ROW_LENGTH), max_tokens)
    if longest > min(max_tokens, row_length):
        raise ValueError(
            f"an example has {longest} tokens, more than max_tokens ({max_tokens}) or row_length "
            f"({row_length})"
        )
    rows = fill_rows(lengths, row_length) if packing else [[at] for at in range(len(lengths))]
    used = [sum(lengths[at] for at in row) for row in rows]
    fullest_first = sorted(range(len(rows)), key=lambda row: -used[row])
    batches = []
    while fullest_first:
        width = used[fullest_first[0]]
        count = max_tokens // width
        batches.append(([rows[row] for row in fullest_first[:count]], width))
        fullest_first = fullest_first[count:]
    return batches


def fill_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Indices of the examples of each row: evenly filled, in few rows."""
    longest_first = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    num_rows = -(-sum(lengths) // row_length)
    while True:
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        fill = [(0, row) for row in range(num_rows)]
        heapify(fill)
        for at in longest_first:
            used, row = fill[0]
            if used + lengths[at] > row_length:
                break
            heapreplace(fill, (used + lengths[at], row))
            rows[row].append(at)
        else:
            return rows
        num_rows += -(-num_rows // 50)  # by 2 %, so that a large set is not tried row by row


def lay_out(
    examples: Sequence[Encoded], rows: Sequence[Sequence[int]], width: int, pad_id: int
) -> MicroBatch:
    """`rows` of `width` tokens, each the examples of these indices."""
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_id)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORED)
    example = torch.full(shape, -1)
    lengths: list[int] = []
    for r, row in enumerate(rows):
        start = 0
        for at in row:
            ids = torch.from_numpy(examples[at].input_ids).long()
            supervised = torch.from_numpy(examples[at].supervised)
            end = start + len(ids)
            input_ids[r, start:end] = ids
            position_ids[r, start:end] = torch.arange(len(ids))
            targets[r, start : end - 1] = ids[1:].where(supervised[1:], IGNORED)
            example[r, start:end] = at
            lengths.append(end - start)
            start = end
        position_ids[r, start:] = torch.arange(width - start)
        if start < width:
            lengths.append(width - start)
    rows_s, columns_s = (targets != IGNORED).nonzero(as_tuple=True)
    return MicroBatch(
        input_ids,
        position_ids,
        targets,
        example,
        (rows_s, columns_s),
        targets[rows_s, columns_s],
        Segments.of(lengths, rows=len(rows)),
    )
