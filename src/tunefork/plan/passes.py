"""What one forward and backward pass takes in: its shape, and a micro-batch of that shape."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunefork.data.bucket import WHOLE_ROWS, bucket
from tunefork.data.pack import MicroBatch, Segments


@dataclass(frozen=True, slots=True)
class Shape:
    """What one forward and backward pass takes in."""

    rows: int
    length: int
    supervised: int
    """Tokens that a loss is computed for."""
    is_masked: bool
    """Rows hold several examples, or padding."""
    segments: int = 0
    """Examples, and paddings, in all rows; 0: each row is one."""
    squares: float = 0.0
    """Sum of their lengths squared; 0: as if all were of one length."""

    @property
    def num_segments(self) -> int:
        """At least one a row."""
        return max(self.segments, self.rows)

    @property
    def attended(self) -> float:
        """What attention within segments works on: the sum of their lengths squared."""
        return self.squares or (self.rows * self.length) ** 2 / self.num_segments

    def padded(self) -> "Shape":
        """What a compiled run makes of it (`data/bucket.py`)."""
        supervised = bucket(self.supervised)
        if not self.is_masked and self.length % WHOLE_ROWS == 0:
            return replace(self, supervised=supervised)
        tokens = bucket(self.rows * self.length)
        segments = bucket(self.num_segments, multiple=8)
        return Shape(1, tokens, supervised, True, segments, self.attended)


def batch_of(shape: Shape) -> MicroBatch:
    """A micro-batch of `shape` on the meta device."""

    def ids(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int64, device="meta")

    grid = (shape.rows, shape.length)
    at = (ids(shape.supervised), ids(shape.supervised))
    starts = torch.empty(shape.num_segments + 1, dtype=torch.int32, device="meta")
    segments = Segments(starts, shape.length, is_uniform=not shape.is_masked)
    return MicroBatch(
        ids(*grid), ids(*grid), ids(*grid), ids(*grid), at, ids(shape.supervised), segments
    )
