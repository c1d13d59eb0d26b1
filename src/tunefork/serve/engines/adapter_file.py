"""An adapter read from its folder for serving.

Checked as when it is loaded to be trained on, and laid out in host memory as the slot will have it,
so that moving it there is copying and nothing else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunefork.errors import AdapterError
from tunefork.registry.peft_deltas import read_deltas
from tunefork.registry.safe_read import is_finite
from tunefork.serve.engine import ServedAdapter


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """Its matrices in host memory."""

    matrices: dict[str, tuple[Tensor, Tensor]]
    """Path of a layer -> scale * A (R, D) and B (O, R), the latter a view of its transpose."""
    rank: int
    """The largest."""
    num_bytes: int


def read_adapter(
    adapter: ServedAdapter,
    skeleton: PreTrainedModel,
    *,
    max_rank: int,
    dtype: torch.dtype,
    pin: bool,
) -> HostAdapter:
    """Read, check and lay out in `dtype`; from pinned memory a GPU copies without waiting.

    `skeleton` is the base on the meta device. Raises AdapterError.
    """
    deltas = read_deltas(skeleton, adapter.folder)
    rank = max(delta.lora_a.shape[0] for delta in deltas.values())
    if rank > max_rank:
        raise AdapterError(
            f"{adapter.id}: has rank {rank}, and this server's slots hold at most {max_rank}; "
            f"start it with --set embedded.max_rank={rank}"
        )
    total = sum(delta.lora_a.numel() + delta.lora_b.numel() for delta in deltas.values())
    flat, at = torch.empty(total, dtype=dtype, pin_memory=pin), 0
    matrices = {}
    for path, (lora_a, lora_b, scale) in deltas.items():
        a_rd = flat[at : at + lora_a.numel()].view_as(lora_a)
        at += lora_a.numel()
        b_ro = flat[at : at + lora_b.numel()].view(lora_b.shape[1], lora_b.shape[0])
        at += lora_b.numel()
        wide = torch.promote_types(lora_a.dtype, dtype)  # rounded once
        torch.mul(lora_a.to(wide), scale, out=a_rd)
        b_ro.copy_(lora_b.t())
        matrices[path] = (a_rd, b_ro.t())
    if not is_finite(flat):
        raise AdapterError(f"{adapter.id}: has values that are not finite in {dtype}")
    return HostAdapter(matrices, rank, total * dtype.itemsize)
