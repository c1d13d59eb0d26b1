"""Out of memory: in which phase, what would help, and (if the recipe says so) a smaller try.

It is said in four ways: `torch.OutOfMemoryError` on a GPU, a RuntimeError of the CPU's allocator
("can't allocate memory"), Python's MemoryError, and an OSError (ENOMEM) of mmap. On a machine that
overcommits, the kernel kills the process instead, and nothing here sees it; the plan and the
rehearsal are for that.

Smaller micro-batches change no gradient: each one's *summed* loss is divided by the supervised
tokens of the whole step (`train/loop.py`), so a step may be cut in any way. Sums are then taken in
another order, which shows in the last bits.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from tunefork.errors import NoMemoryError
from tunefork.model.device import has_int8
from tunefork.recipe import Checkpointing, Method, Recipe

_LESS: dict[Checkpointing, str] = {
    "none": "full (the same gradients, about a quarter slower)",
    "selective": "full (the same gradients, a little slower)",
}
"""What keeps less than a kind of checkpointing, where there is such."""

Phase = Literal["load", "forward", "backward", "optimiser step", "evaluation", "save"]

_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")  # DefaultCPUAllocator, by version


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a phase failed for want of memory, the device's or the host's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # mmap(2), for large files
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _CPU_ALLOCATOR)


@dataclass(frozen=True, slots=True)
class Remedies:
    """What a run could still change to take less memory; the recipe's options in words."""

    method: Method
    micro_batch_tokens: int
    least_tokens: int
    """`data.max_length`: a micro-batch must hold one sequence."""
    checkpointing: Checkpointing
    eight_bit: bool
    master_weights: bool
    """Full fine-tuning keeps fp32 copies of the weights."""
    on_gpu: bool = False
    """The run is on a CUDA GPU, so that host memory is another."""
    releases: bool = False
    """Full fine-tuning updates in the backward pass, so that a step is one micro-batch."""
    may_be_int8: bool = False
    """LoRA's frozen base could be kept in eight bits a weight, and is not."""

    @classmethod
    def of(cls, recipe: Recipe, method: Method, device: torch.device | None = None) -> "Remedies":
        """Of what the recipe says and `device`, where the run is, could do."""
        return cls(
            method=method,
            micro_batch_tokens=recipe.train.micro_batch_tokens,
            least_tokens=recipe.data.max_length,
            checkpointing=recipe.train.checkpointing,
            eight_bit=recipe.full.optimizer == "adamw_8bit",
            master_weights=recipe.full.weights == "fp32",
            releases=method is Method.FULL and recipe.full.gradient_release,
            on_gpu=device is not None and device.type == "cuda",
            may_be_int8=method is Method.LORA
            and not recipe.lora.dora
            and recipe.train.precision != "int8"
            and has_int8(device),
        )

    def cheapest(self, phase: Phase) -> str:
        """What to change first: what costs neither quality nor time comes before what does."""
        activations = phase in ("forward", "backward", "evaluation")
        half = self.micro_batch_tokens // 2
        if activations and half >= self.least_tokens and not self.releases:
            return f"train.micro_batch_tokens: {half} (the same gradients, a little slower)"
        if phase in ("forward", "backward") and self.checkpointing in _LESS:
            return f"train.activation_checkpointing: {_LESS[self.checkpointing]}"
        if self.may_be_int8 and phase in ("load", "forward", "backward", "optimiser step"):
            return "train.precision: int8 (the frozen base takes half of the memory)"
        if phase in ("forward", "backward") and self.on_gpu and self.checkpointing == "full":
            return "train.activation_checkpointing: offload (what is kept waits in host memory)"
        if phase in ("forward", "backward", "optimiser step") and self.method is Method.FULL:
            if not self.eight_bit:
                return "full.optimizer: adamw_8bit"
            if self.master_weights:
                return "full.weights: bf16"
            return "method: lora"
        if phase == "save":
            return "close what else is running on this machine, and run the same command again"
        if self.method is not Method.QLORA:
            return "method: qlora"
        return f"data.max_length below {self.least_tokens}, or a smaller model"


@contextmanager
def phase(name: Phase, remedies: Remedies | None, where: str = "") -> Iterator[None]:
    """Want of memory within becomes a NoMemoryError that names the phase and a remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, NoMemoryError) or not is_out_of_memory(error):
            raise
        # Without the cause: its traceback holds the very tensors that there was no room for.
        raise NoMemoryError(describe(name, remedies, where)) from None


def describe(name: Phase, remedies: Remedies | None, where: str = "") -> str:
    """`out of memory in the forward pass (step 3): set train.micro_batch_tokens: 2048 ...`."""
    words = {"forward": "the forward pass", "backward": "the backward pass", "load": "loading"}
    said = words.get(name, f"the {name}")
    at = f" ({where})" if where else ""
    if remedies is None:
        return f"out of memory in {said}{at}"
    return f"out of memory in {said}{at}; the cheapest change is {remedies.cheapest(name)}"
