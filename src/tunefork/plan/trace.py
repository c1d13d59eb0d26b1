"""A training step run on the meta device: what its tensors take at each moment, and its work.

Nothing is computed. Every operation still goes through PyTorch's dispatcher, so that a
`TorchDispatchMode` sees each tensor come, and a weak reference to its storage tells when it goes:
the same code that trains is what is planned, and no formula has to follow it. What the dispatcher
does not show is added by hand: attention's kernels (`plan.attention`) and the optimiser
(`plan.optimizer`).

Moments are grouped in *segments* (`forward of the first layer`, ...), each with its highest moment.
A segment's peak is linear in the number of layers, which is what `plan.memory` extrapolates.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from tunefork.plan import meta_results
from tunefork.plan.operators import (
    BF16_PRODUCT,
    FLASH,
    INT8_PRODUCT,
    LORA_GRADIENTS,
    PRODUCTS,
    READ_TWICE,
    WRITTEN_OVER,
    bf16_product,
    flash_flops,
    flash_room,
    int8_product,
    kernels_of,
    lora_gradients_flops,
    product,
)
from tunefork.plan.schema import Part

BLOCK_BYTES = 512
"""Sizes are rounded up to this, as PyTorch's CUDA allocator does."""
_FREE = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten._reshape_alias.default,
}
"""Operations that start no kernel."""


def _tensors(values: Any) -> list[Tensor]:
    """Of an operation's arguments or results: tensors, and lists of them."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _in_blocks(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(slots=True)
class Work:
    """What operations of one kind did."""

    count: int = 0
    """Kernels."""
    flops: float = 0.0
    num_bytes: float = 0.0
    """Read and written, each tensor once an operation."""

    def add(self, flops: float, num_bytes: float, kernels: int = 1) -> None:
        """One more operation, of so many kernels."""
        self.count += kernels
        self.flops += flops
        self.num_bytes += num_bytes


@dataclass(slots=True)
class Peak:
    """The highest moment of a segment."""

    total: int = 0
    parts: dict[Part, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that a tensor takes, without the tensor."""

    part: Part
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Like:
    """A tensor's shape and type."""

    shape: torch.Size
    dtype: torch.dtype

    def empty(self) -> Tensor:
        """A new one."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def _likeness(value: Any) -> Any:
    """A value, or of tensors what they are like."""
    return tree_map_only(Tensor, lambda t: _Like(t.shape, t.dtype), value)


_FUSED: dict[Any, Any] = {}
"""What fused functions return, by what they are given: the head asks for each of its chunks."""


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, follows every tensor and counts every operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[Part, int] = {}
        self.part: Part = "activations"
        """What tensors that come now are."""
        self.segment = "start"
        self.peaks: dict[str, Peak] = {}
        self.work: dict[str, Work] = {}
        self.squares = 0.0
        """Sum over a pass's segments of their length squared: attention's work."""
        self._known: dict[int, tuple[Any, Part, int]] = {}

    def total(self) -> int:
        """Bytes alive now."""
        return sum(self.live.values())

    def enter_segment(self, name: str) -> None:
        """From here on moments belong to the segment `name`."""
        self.segment = name
        self._note()

    def adopt(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Follow tensors that were there before, or say what followed ones are."""
        for tensor in tensors:
            self._follow(tensor, part, is_known=True)
        self._note()

    def count(self, kind: str, flops: float, num_bytes: float, kernels: int = 1) -> None:
        """Count an operation that the dispatcher does not see."""
        self.work.setdefault(kind, Work()).add(flops, num_bytes, kernels)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = meta_results.call(func, args, kwargs or {})
        results = _tensors(output)
        for tensor in results:
            self._follow(tensor, self.part)
        self._note()
        if not (func in _FREE or func.is_view):
            inputs = _tensors([*args, *(kwargs or {}).values()])
            touched = list({id(t): t for t in [*inputs, *results]}.values())
            for twice in (WRITTEN_OVER, READ_TWICE):
                if func in twice:
                    touched.append(args[twice[func]])
            moved = sum(t.numel() * t.element_size() for t in touched)
            if func in PRODUCTS:
                left = PRODUCTS[func]
                self.count(*product(args[left].shape, args[left + 1].shape), moved)
            elif func is INT8_PRODUCT:
                narrow = None if args[4] is None else args[4].shape
                self.count(*int8_product(args[0].shape, args[1].shape, narrow), moved)
            elif func in LORA_GRADIENTS:
                shapes = [[tensor.shape for tensor in args[at]] for at in (0, 2)]
                kernels = 2 * len(args[0]) + LORA_GRADIENTS[func]
                self.count("skinny", lora_gradients_flops(*shapes), moved, kernels)
            elif func is BF16_PRODUCT:
                narrow = None if args[2] is None else args[2].shape
                part, right = args[0][0].shape, args[1].shape
                self.count(*bf16_product(part, right, narrow, args[4]), moved)
            elif func in FLASH:
                query = args[0 if FLASH[func] == 1.0 else 1]
                if FLASH[func] > 1.0:
                    keys = args[2]
                    self.note_room(flash_room(query.shape, keys.shape, len(args[6]) - 1))
                self.count("attention", FLASH[func] * flash_flops(query.shape, self.squares), moved)
            else:
                kind = "dequantize" if func.namespace == "bitsandbytes" else "memory"
                self.count(kind, 0.0, moved, kernels_of(func, args))
        return output

    def run_fused(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A function that a GPU runs as one kernel: only what it returns takes memory."""
        given = tree_leaves((args, kwargs))
        with _disable_current_modes():
            key = (function, *map(_likeness, given))
            if key not in _FUSED:
                _FUSED[key] = _likeness(function(*args, **kwargs))
            output = tree_map_only(_Like, _Like.empty, _FUSED[key])
        results = _tensors(output)
        for tensor in results:
            self._follow(tensor, self.part)
        self._note()
        read = _tensors(given)
        self.count("memory", 0.0, sum(t.numel() * t.element_size() for t in [*read, *results]))
        return output

    def take(self, num_bytes: int) -> Room:
        """Memory for a tensor that nobody needs as one; to be given back."""
        room = Room(self.part, _in_blocks(num_bytes))
        self.live[room.part] = self.live.get(room.part, 0) + room.num_bytes
        self._note()
        return room

    def give_back(self, room: Room) -> None:
        """What was taken."""
        self.live[room.part] -= room.num_bytes

    def note_room(self, num_bytes: int) -> None:
        """That an operation takes so much for itself while it runs."""
        self.give_back(self.take(num_bytes))

    def _follow(self, tensor: Tensor, part: Part, *, is_known: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is not None:
            if is_known and known[1] != part:
                self.live[known[1]] -= known[2]
                self.live[part] = self.live.get(part, 0) + known[2]
                self._known[key] = (known[0], part, known[2])
            return
        size = _in_blocks(storage.nbytes())
        reference = weakref.ref(storage, lambda _: self._forget(key))
        self._known[key] = (reference, part, size)
        self.live[part] = self.live.get(part, 0) + size

    def _forget(self, key: int) -> None:
        _, part, size = self._known.pop(key)
        self.live[part] -= size

    def _note(self) -> None:
        peak = self.peaks.setdefault(self.segment, Peak())
        total = self.total()
        if total > peak.total:
            peak.total, peak.parts = total, dict(self.live)
