"""Micro-batches of few sizes: what is compiled or captured for a size serves every batch of it.

A batch is laid out as one row and filled up: tokens by padding segments, segments by empty ones,
supervised places by such whose label is ignored. The filling adds nothing to the loss or a
gradient, and no token of an example sees it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tunefork.data.pack import IGNORED, MicroBatch, Segments


@dataclass(frozen=True, slots=True)
class Size:
    """All that a compiled or captured pass depends on: the key of a table of such."""

    rows: int
    length: int
    """Tokens of a row."""
    segments: int
    """E. Flash attention's backward pass keeps fp32 room for 128 tokens more in each."""
    longest: int
    supervised: int


def bucket(count: int, *, multiple: int = 64) -> int:
    """The least of the sizes kept for `count` things that holds them.

    Between a power of two and the next lie 8 sizes at equal distance, or as many as are multiples
    of `multiple` (a power of two). So a ninth at most is filling, or less than `multiple`.
    """
    octave = 1 << max(0, (count - 1).bit_length() - 1)
    step = max(multiple, octave // 8)
    return max(1, -(-count // step)) * step


def size_of(batch: MicroBatch) -> Size:
    """The size to which `batch` is padded. Rows that are one segment each stay rows."""
    rows, length = batch.input_ids.shape
    supervised = bucket(len(batch.labels))
    if batch.segments.is_uniform:
        return Size(rows, length, rows, length, supervised)
    tokens = bucket(rows * length)
    longest = 1 << max(7, (batch.segments.longest - 1).bit_length())
    added = -(-(tokens - rows * length) // longest)
    segments = bucket(len(batch.segments.starts) - 1 + added, multiple=8)
    return Size(1, tokens, segments, longest, supervised)


def padded(batch: MicroBatch, size: Size) -> MicroBatch:
    """`batch`, on the CPU, with exactly the shapes of `size`. Its loss and gradient are the same.

    Raises ValueError where it does not fit.
    """
    if (size.rows, size.length) != tuple(batch.input_ids.shape):
        if size.rows != 1:
            raise ValueError(f"a batch of {tuple(batch.input_ids.shape)} tokens is not of {size}")
        batch = _lengthened(flattened(batch), size)
    filling = size.supervised - len(batch.labels)
    empty = size.segments - (len(batch.segments.starts) - 1)
    if filling < 0 or empty < 0 or batch.segments.longest > size.longest:
        raise ValueError(
            f"a batch of {len(batch.segments.starts) - 1} segments of up to "
            f"{batch.segments.longest} tokens, {len(batch.labels)} supervised, is not of {size}"
        )
    rows, columns = batch.supervised
    # Places of their own as far as there are: gradients of one place are added up one by one.
    at = torch.arange(filling) % (size.rows * size.length)
    starts = batch.segments.starts
    return MicroBatch(
        batch.input_ids,
        batch.position_ids,
        batch.targets,
        batch.example,
        (torch.cat([rows, at // size.length]), torch.cat([columns, at % size.length])),
        _filled(batch.labels, filling, IGNORED),
        Segments(
            torch.cat([starts, starts[-1:].expand(empty)]), size.longest, batch.segments.is_uniform
        ),
    )


def flattened(batch: MicroBatch) -> MicroBatch:
    """The same as one row of R * T tokens."""
    rows, length = batch.input_ids.shape
    row, column = batch.supervised
    segments = batch.segments
    return MicroBatch(
        batch.input_ids.reshape(1, -1),
        batch.position_ids.reshape(1, -1),
        batch.targets.reshape(1, -1),
        batch.example.reshape(1, -1),
        (torch.zeros_like(row), row * length + column),
        batch.labels,
        Segments(segments.starts, segments.longest, segments.is_uniform and rows == 1),
    )


def _lengthened(batch: MicroBatch, size: Size) -> MicroBatch:
    """One row, filled up to `size.length` by segments of padding, none longer than its longest."""
    used = batch.input_ids.shape[1]
    added = size.length - used
    if added < 0:
        raise ValueError(f"a batch of {used} tokens is not of {size}")
    positions = torch.arange(added) % size.longest
    ends = [*range(used + size.longest, size.length, size.longest), size.length] if added else []
    starts = torch.cat([batch.segments.starts, torch.tensor(ends, dtype=torch.int32)])
    return MicroBatch(
        _filled(batch.input_ids, added, int(batch.input_ids[0, 0])),
        torch.cat([batch.position_ids, positions[None]], dim=1),
        _filled(batch.targets, added, IGNORED),
        _filled(batch.example, added, -1),
        batch.supervised,
        batch.labels,
        Segments(
            starts,
            max(batch.segments.longest, min(added, size.longest)),
            batch.segments.is_uniform and not added,
        ),
    )


def _filled(values: Tensor, count: int, value: int) -> Tensor:
    """With `count` more of `value` at the end of the last dimension."""
    return torch.nn.functional.pad(values, (0, count), value=value)
