"""Where a pass's keys and values lie: what every attention layer of it is told.

Shape legend as in `attention.py`.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """A request's part of a pass, on the host."""

    first: int
    """Where its new tokens begin in the pass."""
    new: int
    """How many they are."""
    start: int
    """Where its region begins in the cache."""
    used: int
    """Tokens in its region, the new ones with them."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """The rows of one token that a pass with prompts begins with, which `flash` reads apart.

    M rows may be such ones: those that are come first, and the others see nothing.
    """

    used_m: Tensor
    """(M,) int32, as `Reads.used_r`; 0 of the others."""
    starts_rest: Tensor
    """(R + 1,) int32, `Reads.starts_q` of all rows, where these have no tokens."""


@dataclass(slots=True)
class Reads:
    """Where a pass's keys and values lie."""

    write_n: Tensor
    """Where in the cache each new token goes, int64."""
    starts_q: Tensor
    """(R + 1,) int32, where each row's tokens begin in the pass."""
    starts_k: Tensor
    """(R + 1,) int32, where each row's region begins; the last is not read."""
    used_r: Tensor
    """(R,) int32, how many tokens of its region each row sees."""
    longest_q: int | None
    """None: it may be all tokens of the pass, which is then the bound."""
    longest_k: int
    spans: tuple[Span, ...] | None = None
    """For `sdpa`; None: `flash`."""
    grouped: dict[int, Tensor] = field(default_factory=dict)
    """Of rows of one token, where `flash` is to group heads: `starts_q` times so many query heads
    of one key-value head. With `decoding`: of its rows."""
    decoding: Decoding | None = None
    """None: all rows are of one token, or they are read as one."""
    made: dict[Any, Any] = field(default_factory=dict)
    """What layers share: masks, and where to gather from."""
