"""Examples of many lengths become rectangles of tokens, with nothing leaking between them.

Every example lies whole in one row. Where several share a row, positions restart at each, and
transformers derives from them, given no attention mask, that a token sees its own example only
(`find_packed_sequence_indices` in transformers/masking_utils.py). Padding is one more such segment.

Rows are filled by best fit, longest example first: like first fit within 22 % of the least number
of rows (Johnson et al. 1974, https://doi.org/10.1137/0203025), and found by bisection, so that a
large evaluation set takes no time. Rows are then grouped by how full they are, which leaves little
padding.

Shape legend: R rows, T tokens of a row.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tunefork.data.example import Encoded

IGNORED = -100
"""Target of a position after which nothing supervised follows."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass takes: call the model with `input_ids`, `position_ids`, no mask."""

    input_ids: Tensor
    """(R, T) int64"""
    position_ids: Tensor
    """(R, T) int64, from 0 at each example and at the padding."""
    targets: Tensor
    """(R, T) int64, the token that follows `input_ids[r, t]` in its example where that one is
    supervised, else -100. Shifted already."""
    example: Tensor
    """(R, T) int64, index into the examples given to `pack`; -1 for padding."""

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return type(self)(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.targets.to(device),
            self.example.to(device),
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
    default the longest example's length, because attention costs its square). The same examples
    give the same micro-batches. Raises ValueError where an example is longer than either limit.
    """
    longest = max((len(example.input_ids) for example in examples), default=0)
    row_length = row_length or longest
    if longest > min(max_tokens, row_length):
        raise ValueError(
            f"an example has {longest} tokens, more than max_tokens ({max_tokens}) or row_length "
            f"({row_length})"
        )
    lengths = [len(example.input_ids) for example in examples]
    rows = _fill_rows(lengths, row_length) if packing else [[at] for at in range(len(examples))]
    used = [sum(lengths[at] for at in row) for row in rows]
    fullest_first = sorted(range(len(rows)), key=lambda row: -used[row])
    batches = []
    while fullest_first:
        width = used[fullest_first[0]]
        count = max_tokens // width
        batch = [rows[row] for row in fullest_first[:count]]
        batches.append(_lay_out(examples, batch, width, pad_id))
        fullest_first = fullest_first[count:]
    return batches


def _fill_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Indices of the examples of each row, by best fit, longest first."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # ascending (tokens left, row)
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        fit = bisect_left(free, (lengths[at], -1))
        if fit == len(free):
            left, row = row_length, len(rows)
            rows.append([])
        else:
            left, row = free.pop(fit)
        rows[row].append(at)
        insort(free, (left - lengths[at], row))
    return rows


def _lay_out(
    examples: Sequence[Encoded], rows: Sequence[Sequence[int]], width: int, pad_id: int
) -> MicroBatch:
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_id)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORED)
    example = torch.full(shape, -1)
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
            start = end
        position_ids[r, start:] = torch.arange(width - start)
    return MicroBatch(input_ids, position_ids, targets, example)
