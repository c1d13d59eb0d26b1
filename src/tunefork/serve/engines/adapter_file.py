"""An adapter read from its folder for serving: checked as when it is loaded to be trained on."""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from tunefork.errors import AdapterError
from tunefork.registry.peft_deltas import Deltas, read_deltas
from tunefork.serve.engine import ServedAdapter


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """Its matrices in host memory."""

    deltas: Deltas
    num_bytes: int


def read_adapter(
    adapter: ServedAdapter, skeleton: PreTrainedModel, *, max_rank: int, pin: bool
) -> HostAdapter:
    """Read and check; pinned memory is copied to a GPU without waiting.

    `skeleton` is the base on the meta device. Raises AdapterError.
    """
    deltas = read_deltas(skeleton, adapter.folder)
    rank = max(delta.lora_a.shape[0] for delta in deltas.values())
    if rank > max_rank:
        raise AdapterError(
            f"{adapter.id}: has rank {rank}, and this server's slots hold at most {max_rank}; "
            f"start it with --set embedded.max_rank={rank}"
        )
    if pin:
        deltas = {
            path: delta._replace(lora_a=delta.lora_a.pin_memory(), lora_b=delta.lora_b.pin_memory())
            for path, delta in deltas.items()
        }
    return HostAdapter(deltas, sum(_bytes(d.lora_a) + _bytes(d.lora_b) for d in deltas.values()))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
