"""GPUs, their rates and prices, and what managed services ask: catalogue.yaml, and the user's own.

Every row names its source and its date. A file given by the user (`--catalogue FILE`, or
`catalogue.yaml` in TUNEFORK_HOME) adds rows, or replaces fields of rows with the same id.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU."""

    id: str
    name: str
    memory_bytes: int
    """What a program can allocate, not what the box says, is a little less; see `usable_bytes`."""
    bf16_flops: float
    """Dense, a second."""
    fp8_flops: float | None
    bandwidth: float
    """Bytes a second of device memory."""
    link_bandwidth: float
    """Bytes a second between two of them."""
    usd_per_hour: float
    source: str
    date: str


@dataclass(frozen=True, slots=True)
class Machine:
    """Some GPUs of one kind."""

    gpu: Gpu
    count: int
