"""How linear layers that read the same input lie in one product.

q, k and v read one input, gate and up another: their weights stand one below the other, their A
matrices too, and each has a B of its own.

Shape legend: O features out (of all layers), R rank (their sum).
"""

from typing import Literal, NamedTuple

Storage = Literal["bf16", "int8", "fp8", "nf4"]
"""How the frozen weight is kept: bf16, int8 and a scale a row, e4m3 and a scale a row (served, not
trained over), 4-bit NormalFloat."""
Products = Literal["bf16", "int8", "fp8"]
"""What is multiplied: bf16, int8 or e4m3 with bf16 results."""

_APART = 48
"""Directions that are multiplied apart beside int8's codes: they leave 0.63 % of error in
SmolLM2-135M's products, none 2.55 (docs/int8.md). On some of its layers 16, 48 and 64 left 0.83,
0.56 and 0.52 (an emulation)."""


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
        """Directions of x that are taken out of it and multiplied apart, as the delta's R are."""
        return _APART if self.products == "int8" else 0

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First and last row (exclusive) of each layer among the O."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return [(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
