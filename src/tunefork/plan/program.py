"""A program: what a compiled graph allocates and does, kernel by kernel, for any number of tokens.

`plan/graph.py` makes it of a graph, `plan/compiled.py` runs it in a trace.
"""

from dataclasses import dataclass, field

from tunefork.plan.operators import flash_flops, flash_room


@dataclass(frozen=True, slots=True)
class Size:
    """So much a token, and so much whatever the tokens."""

    per_token: float = 0.0
    fixed: float = 0.0

    def __call__(self, tokens: int) -> float:
        return self.per_token * tokens + self.fixed

    def __add__(self, other: "Size") -> "Size":
        return Size(self.per_token + other.per_token, self.fixed + other.fixed)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel: what is gone before its results come, its results, and what is gone after it."""

    kind: str
    makes: tuple[tuple[str, Size], ...]
    moved: Size
    flops: Size = field(default_factory=Size)
    replaces: str | None = None
    """A tensor of the same size whose place the result takes."""
    frees: tuple[str, ...] = ()
    query: tuple[int, int, int] | None = None
    """Attention: heads, heads of the keys, features."""
    share: float = 0.0
    """Attention: operations in units of a forward pass's."""
    launches: int = 1
    """Kernels that it is on a GPU: an operator may start several."""

    def room(self, tokens: int, segments: int) -> int:
        """Bytes taken while it runs."""
        if self.query is None or self.share == 1.0:
            return 0
        heads, kv_heads, features = self.query
        return flash_room((tokens, heads, features), (tokens, kv_heads, features), segments)

    def work(self, tokens: int, squares: float) -> float:
        """Operations."""
        if self.query is None:
            return self.flops(tokens)
        heads, _, features = self.query
        return self.share * flash_flops((tokens, heads, features), squares)


@dataclass(frozen=True, slots=True)
class Program:
    """A graph's kernels in order; tensors have the names of the graph's nodes."""

    kernels: tuple[Kernel, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str | None, ...]
    """The tensor that each output is or is a view of; None for what is no tensor."""
    sizes: dict[str, Size]
