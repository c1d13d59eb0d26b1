"""An adapter read from its folder for serving: checked as when it is loaded to be trained on.

It stays in host memory as its file has it; scaled, transposed and rounded it is in its slot.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from tunefork.errors import AdapterError
from tunefork.registry.peft_deltas import Deltas, read_deltas
from tunefork.serve.engine import ServedAdapter


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """Its matrices in host memory."""

    deltas: Deltas
    rank: int
    """The largest."""
    num_bytes: int


def read_adapter(
    adapter: ServedAdapter, skeleton: PreTrainedModel, *, max_rank: int, most: float
) -> HostAdapter:
    """Read and check; values above `most` have no place in a slot. `skeleton` is the base on the
    meta device. Raises AdapterError."""
    deltas = read_deltas(skeleton, adapter.folder, most=most)
    rank = max(delta.lora_a.shape[0] for delta in deltas.values())
    if rank > max_rank:
        raise AdapterError(
            f"{adapter.id}: has rank {rank}, and this server's slots hold at most {max_rank}; "
            f"start it with --set embedded.max_rank={rank}"
        )
    num_bytes = sum(delta.lora_a.nbytes + delta.lora_b.nbytes for delta in deltas.values())
    return HostAdapter(deltas, rank, num_bytes)
