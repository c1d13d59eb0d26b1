"""How linear layers that read the same input lie in one product.

q, k and v read one input, gate and up another: their weights stand one below the other, their A
matrices too, and each has a B of its own.

Shape legend: O features out (of all layers), R rank (their sum), P columns of the widened part.
"""

from typing import Literal, NamedTuple

Storage = Literal["bf16", "e4m5", "fp8", "nf4"]
"""How the frozen weight is kept: bf16, ten bits for e4m3 to be drawn of (`e4m5.py`), e4m3, 4-bit
NormalFloat."""
Products = Literal["bf16", "fp8"]
"""What is multiplied: bf16, or e4m3 with bf16 results."""

_STEP = 64
"""The widened part is filled up to a multiple of this. A GEMM on Hopper takes the inner dimension
in such pieces, and is slower than without the part where it ends inside one (measured on an H200:
K + 48 costs 13 to 29 %, K + 64 at most 5 %)."""
_APART = {"e4m5": 48, "nf4": 64}
"""Directions that are multiplied apart. 16, 32, 48 and 64 leave 1.46, 1.24, 1.14 and 1.08 % of
error in SmolLM2-135M's products with NF4's nearest codes; 16 more cost an 8B model's step 0.4 %, by
count, which QLoRA has time for. Over e4m5, 16 left training 0.7 % away from bf16, none 1.6 %
(docs/fp8.md)."""


class Layout(NamedTuple):
    """The layers of one product. A tuple, so that torch.compile takes it for a constant."""

    storage: Storage
    products: Products
    sizes: tuple[int, ...]
    """Features out of each layer."""
    ranks: tuple[int, ...]
    """Of each layer's delta; 0 for none."""
    scale: float
    """Of the deltas."""

    @property
    def rank(self) -> int:
        """R"""
        return sum(self.ranks)

    @property
    def apart(self) -> int:
        """Directions of x that are taken out of it and multiplied apart, as the delta's R are: of a
        base that is trained over."""
        return _APART.get(self.storage, 0)

    @property
    def width(self) -> int:
        """P, the columns by which an FP8 product is widened for the delta (`kernels/fp8.py`)."""
        return -(-3 * (self.rank + self.apart) // _STEP) * _STEP

    @property
    def filling(self) -> int:
        """Of the `width`, the columns that nothing needs."""
        return self.width - 3 * (self.rank + self.apart)

    @property
    def back_width(self) -> int:
        """P of the product for the input's gradient."""
        return -(-3 * self.rank // _STEP) * _STEP

    @property
    def bf16_width(self) -> int:
        """Columns by which a bf16 product is widened for the delta (`kernels/lora_group.py`)."""
        return -(-self.rank // _STEP) * _STEP

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First and last row (exclusive) of each layer among the O."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return [(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
