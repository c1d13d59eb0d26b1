"""Micro-batches of few sizes: what is compiled or captured for a size serves every batch of it.

A batch is laid out as one row and filled up: tokens by padding segments, segments by empty ones,
supervised places by such whose label is ignored. The filling adds nothing to the loss or a
gradient, and no token of an example sees it. Rows that are one segment each stay as they are, since
they have the faster kernel. All this is for models that take segments (`model.head`): of a row so
long others would make a mask.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunefork.data.pack import IGNORED, MicroBatch, Segments
from tunefork.data.slots import is_even

WHOLE_ROWS = 128
"""Rows of one segment are kept as rows where their length is a multiple of this: kernels that are
planned for a shape would be planned without end for chance lengths."""

SHORTEST = 128
"""Least limit on a segment's tokens: flash attention works in blocks of as many."""


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
    is_uniform: bool
    is_even: bool = False
    """Of adapters that share the pass all have as many tokens (`kernels/bank.py`)."""


def bucket(count: int, *, multiple: int = 64) -> int:
    """The least of the sizes kept for `count` things that holds them.

    Between a power of two and the next lie 8 sizes at equal distance, or as many as are multiples
    of `multiple` (a power of two). So the filling is less than an eighth of the things, or less
    than `multiple`.
    """
    octave = 1 << max(0, (count - 1).bit_length() - 1)
    step = max(multiple, octave // 8)
    return max(1, -(-count // step)) * step


def limit(longest: int) -> int:
    """The next power of two, from `SHORTEST` on."""
    return max(SHORTEST, 1 << (longest - 1).bit_length())


def size_of(batch: MicroBatch) -> Size:
    """The size to which `batch` is best padded."""
    rows, length = batch.input_ids.shape
    supervised = bucket(len(batch.labels))
    if batch.segments.is_uniform and length % WHOLE_ROWS == 0:
        even = batch.slots is not None and is_even(batch.slots.bounds)
        return Size(rows, length, rows, length, supervised, is_uniform=True, is_even=even)
    tokens, longest = bucket(rows * length), limit(batch.segments.longest)
    added = -(-(tokens - rows * length) // longest)
    segments = bucket(len(batch.segments.starts) - 1 + added, multiple=8)
    even = batch.slots is not None and is_even(batch.slots.lengthened(tokens, 0).bounds)
    return Size(1, tokens, segments, longest, supervised, is_uniform=False, is_even=even)


def holds(size: Size, batch: MicroBatch) -> bool:
    """Whether `batch` can be filled up to `size`."""
    if batch.segments.longest > size.longest or len(batch.labels) > size.supervised:
        return False
    rows, length = batch.input_ids.shape
    if size.is_uniform:
        return batch.segments.is_uniform and (rows, length) == (size.rows, size.length)
    added = size.length - rows * length
    pieces = -(-added // size.longest)
    is_room = len(batch.segments.starts) - 1 + pieces <= size.segments
    return size.rows == 1 and added >= 0 and is_room


def padded(batch: MicroBatch, size: Size) -> MicroBatch:
    """`batch`, on the CPU, with exactly the shapes of `size`. Its loss and gradient are the same.

    Raises ValueError where it does not fit.
    """
    if not holds(size, batch):
        raise ValueError(
            f"a batch of {batch.input_ids.numel()} tokens in {len(batch.segments.starts) - 1} "
            f"segments of up to {batch.segments.longest}, {len(batch.labels)} supervised, is not "
            f"of {size}"
        )
    if not size.is_uniform:
        batch = _lengthened(flattened(batch), size)
    filling = size.supervised - len(batch.labels)
    # Places of their own as far as there are: the gradients of one place are added up in turn.
    at = torch.arange(filling) % batch.input_ids.numel()
    rows, columns = batch.supervised
    return replace(
        batch,
        supervised=(
            torch.cat([rows, at // size.length]),
            torch.cat([columns, at % size.length]),
        ),
        labels=_filled(batch.labels, filling, IGNORED),
        slots=batch.slots and batch.slots.lengthened(size.rows * size.length, filling),
    )


def flattened(batch: MicroBatch) -> MicroBatch:
    """The same as one row of R * T tokens."""
    rows, length = batch.input_ids.shape
    row, column = batch.supervised
    return replace(
        batch,
        input_ids=batch.input_ids.reshape(1, -1),
        position_ids=batch.position_ids.reshape(1, -1),
        targets=batch.targets.reshape(1, -1),
        example=batch.example.reshape(1, -1),
        supervised=(torch.zeros_like(row), row * length + column),
        segments=replace(batch.segments, is_uniform=batch.segments.is_uniform and rows == 1),
    )


def _lengthened(batch: MicroBatch, size: Size) -> MicroBatch:
    """One row, filled up by segments of padding that are no longer than `size.longest`."""
    used = batch.input_ids.shape[1]
    added = size.length - used
    # The last start is repeated for the segments that stay empty.
    ends = [used + size.longest * (at + 1) for at in range(size.segments)]
    starts = batch.segments.starts.tolist()
    starts += [min(end, size.length) for end in ends[: size.segments + 1 - len(starts)]]
    positions = torch.arange(added)[None] % size.longest
    return replace(
        batch,
        input_ids=_filled(batch.input_ids, added, int(batch.input_ids[0, 0])),
        position_ids=torch.cat([batch.position_ids, positions], dim=1),
        targets=_filled(batch.targets, added, IGNORED),
        example=_filled(batch.example, added, -1),
        segments=Segments(torch.tensor(starts, dtype=torch.int32), size.longest, is_uniform=False),
    )


def _filled(values: Tensor, count: int, value: int) -> Tensor:
    """With `count` more of `value` at the end of the last dimension."""
    return torch.nn.functional.pad(values, (0, count), value=value)
