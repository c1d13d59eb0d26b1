"""One micro-batch's forward and backward pass: launched kernel by kernel, or replayed at once.

A pass over few tokens is over before Python has launched its kernels: 512 tokens of an 8B model
take a Hopper GPU 30 ms and the host 150. A CUDA graph holds all the launches of a pass and is
launched as one. It is bound to addresses and sizes, so batches are filled up to few sizes
(`data/bucket.py`), inputs are copied to where the graph reads them, and gradients add up in tensors
that stay where they are.

A size is launched the first time it comes, which compiles what has to be compiled, and captured the
second time. Where memory would not hold a second pass's activations beside the first's, it is not
captured: a graph keeps its own. Graphs share one pool, as large as the largest pass needs, so one
that is larger than those before it takes their place, and they are captured again as they come.
Where a capture fails, passes are launched.

Examples of many lengths come in many sizes, most of them once or twice. So a pass for which the GPU
would wait is filled up further where a captured size is near (`nearest_size.py`).
"""

import gc
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunefork.data.bucket import Size, padded, size_of
from tunefork.data.pack import MicroBatch
from tunefork.model.bank import Bank
from tunefork.model.head import Head
from tunefork.train.loss import loss_sum, slot_losses
from tunefork.train.nearest_size import most_waiting_tokens, nearest
from tunefork.train.out_of_memory import Remedies, phase

MOST_TOKENS = 16384
"""Of a pass that is captured: with more, the GPU is the slower one with any model worth a GPU."""
_MOST_GRAPHS = 16
_OFTEN = 30
"""Times that a size comes before it is captured though a near one is: that takes a second."""
_MOST_POOLS = 8
"""Of a run: where sizes only ever grow, most captures would be made for nothing."""
MOST_GRADIENT_BYTES = 2**30
"""Of a pass that is captured: its gradients are there all the time, in the forward pass too."""
ROOM = 1.25
"""Free memory that a capture asks for, in units of the most that was used above the weights."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured pass, and the tensors it reads and writes."""

    graph: Any
    batch: MicroBatch
    divisor: Tensor
    loss: Tensor

    def replay(self, batch: MicroBatch, divisor: Tensor) -> Tensor:
        """The pass for `batch`, which is on the CPU; gradients are added."""
        for ours, theirs in zip(_inputs(self.batch), _inputs(batch), strict=True):
            ours.copy_(theirs, non_blocking=True)
        self.divisor.copy_(divisor, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()  # the next replay writes there


@dataclass(frozen=True, slots=True)
class Laid:
    """A micro-batch on the CPU, ready to run."""

    batch: MicroBatch
    supervised: int
    """Its supervised tokens, places that only fill it up not counted."""
    size: Size | None = None
    """Where it was filled up to one."""


class Runner:
    """Runs passes of one model. `pads` fills batches up to few sizes, `captures` replays them.

    With a `bank` each pass is of many adapters, and their losses are kept apart.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        *,
        pads: bool = False,
        captures: bool = False,
        remedies: Remedies | None = None,
        bank: Bank | None = None,
    ) -> None:
        self.model, self.head, self.remedies, self.bank = model, head, remedies, bank
        self.pads, self.captures = pads or captures, captures
        self.graphs: dict[Size, _Graph] = {}
        self.seen: set[Size] = set()
        """That were launched."""
        self.met = Counter[Size]()
        """How often batches of each came to be laid out."""
        self.num_pools = 0
        """Times that memory was taken for graphs since it was last given back."""
        self.gradients: list[Tensor] = []
        self.stream: Any = None
        self.renew()

    def lay_out(self, batch: MicroBatch) -> Laid:
        """`batch`, from the CPU, in the shape that its pass will have."""
        num_supervised = len(batch.labels)
        if not self.pads:
            return Laid(batch, num_supervised)
        size = size_of(batch)
        self.met[size] += 1
        # Filled up otherwise it rounds otherwise, and what comes often is worth a graph of its own.
        is_exact = self.bank is not None or torch.are_deterministic_algorithms_enabled()
        is_often = self.met[size] > _OFTEN and len(self.graphs) < _MOST_GRAPHS
        if not (size in self.graphs or is_exact or is_often):
            size = nearest(size, batch, self.graphs, self._most_waiting)
        whole = padded(batch, size)
        # A replay's copies from other memory would wait for the pass before it.
        pins = self.captures and self.model.device.type == "cuda"
        return Laid(whole.pinned() if pins else whole, num_supervised, size)

    def loss(self, laid: Laid, supervised: int | Tensor, where: str) -> Tensor:
        """Summed loss of a micro-batch over `supervised`: fp32, without a gradient.

        () for one number; (G,) where `supervised` (G,) has one for each slot of the bank. The
        gradient is added to the parameters'. Raises NoMemoryError, which `where` is part of.
        """
        batch, size = laid.batch, laid.size
        divisor = torch.as_tensor(supervised, dtype=torch.float32)
        if self.gradients:  # a launched pass would make others beside them
            self._attach_gradients()
        if size is not None:
            if size not in self.graphs and size in self.seen and self._may_capture(size):
                if not self._has_pool_for(size):
                    self._drop_passes()
                    self.num_pools += 1
                self._try_capture(size, batch)
            if size in self.graphs:
                return self.graphs[size].replay(batch, divisor)
            self.seen.add(size)
        loss = self.forward(laid, divisor, where)
        self.backward(loss, where)
        return loss.detach()

    def forward(self, laid: Laid, supervised: int | Tensor, where: str) -> Tensor:
        """`loss`, launched, with its graph, for `backward` to take the gradient."""
        divisor = torch.as_tensor(supervised, dtype=torch.float32)
        divisor = divisor.to(self.model.device, non_blocking=True)
        with phase("forward", self.remedies, where):
            return self._loss(laid.batch.to(self.model.device), divisor)

    def backward(self, loss: Tensor, where: str) -> None:
        """Add the gradient of what `forward` gave to the parameters'."""
        with phase("backward", self.remedies, where):
            loss.sum().backward()  # type: ignore[no-untyped-call]

    def _loss(self, batch: MicroBatch, divisor: Tensor) -> Tensor:
        if self.bank is None:
            return loss_sum(self.model, self.head, batch) / divisor
        assert batch.slots is not None
        self.bank.route_segments(batch.slots.bounds, batch.slots.ends)
        return slot_losses(self.model, self.head, batch, divisor)

    def drop_graphs(self) -> None:
        """Give back what captured passes keep: where memory is short, that is a pass's own."""
        self._drop_passes()
        self.gradients, self.num_pools = [], 0

    def without_graphs(self) -> None:
        """From here on every pass is launched: one had no room beside the captured ones."""
        self.drop_graphs()
        self.captures = False
        warnings.warn(
            "train.compile: a pass that was launched had no memory beside captured ones; from here "
            "on all are launched kernel by kernel, and short steps take longer",
            stacklevel=2,
        )

    def _drop_passes(self) -> None:
        if self.graphs and self.model.device.type == "cuda":
            # Memory that is given back while a replay is under way would be taken from under it:
            # the allocator waits for the stream of the capture, not for that of the replay.
            torch.cuda.synchronize(self.model.device)
        self.graphs.clear()

    def renew(self) -> None:
        """Take over the model's parameters as they are now: others than before, or moved."""
        self.drop_graphs()
        self.seen.clear()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self._most_waiting = most_waiting_tokens(self.model)

    def _may_capture(self, size: Size) -> bool:
        if not self.captures or size.rows * size.length > MOST_TOKENS:
            return False
        # A bank's gradients are there all the time anyway.
        gradient_bytes = sum(p.numel() * p.element_size() for p in self.trained)
        if self.bank is None and gradient_bytes > MOST_GRADIENT_BYTES:
            return False
        if self._has_pool_for(size):
            return len(self.graphs) < _MOST_GRAPHS
        # What the graphs so far keep is unused memory here: it is given back before.
        device = self.model.device
        free, _ = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        unused = torch.cuda.memory_reserved(device) - allocated
        needed = torch.cuda.max_memory_allocated(device) - allocated
        return self.num_pools < _MOST_POOLS and free + unused > ROOM * needed

    def _has_pool_for(self, size: Size) -> bool:
        """Whether a graph's memory is there that this one can share."""
        return any(size.rows * size.length <= g.rows * g.length for g in self.graphs)

    def _attach_gradients(self) -> None:
        """Gradients where the graphs add to them; those that were dropped start at zero."""
        if not self.gradients:
            self.gradients = [
                torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained
            ]
        for parameter, gradient in zip(self.trained, self.gradients, strict=True):
            if parameter.grad is None:
                gradient.zero_()
                parameter.grad = gradient
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
                parameter.grad = gradient

    def _try_capture(self, size: Size, batch: MicroBatch) -> None:
        """Capture the pass of `size`, or no more passes at all where that fails.

        Some architectures wait for the GPU in their forward pass (a rotary embedding that looks
        for the longest position), which breaks a capture, and memory may be short. Neither keeps
        the pass from being launched.
        """
        failed: str | None = None
        try:
            self.graphs[size] = self._capture(batch)
        except RuntimeError as error:  # OutOfMemoryError is one
            failed = str(error).partition("\n")[0]
        if failed is not None:  # outside of `except`: the error holds the failed pass's tensors
            self.captures = False
            torch.cuda.empty_cache()
            warnings.warn(
                f"train.compile: a pass could not be captured as a CUDA graph ({failed}); from "
                "here on new sizes are launched kernel by kernel, and short steps take longer",
                stacklevel=2,
            )

    def _capture(self, batch: MicroBatch) -> _Graph:
        """The graph of a pass as large as `batch`; nothing is computed yet."""
        device = self.model.device
        self._attach_gradients()
        static = batch.to(device)
        divisor = torch.ones(_divisors(batch), device=device)
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # what is free goes to the graph's pool
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).graph.pool() if self.graphs else None
        with _no_garbage(), torch.cuda.graph(graph, pool=pool, stream=self.stream):
            loss = self._loss(static, divisor)
            loss.sum().backward()  # type: ignore[no-untyped-call]
        return _Graph(graph, static, divisor, loss.detach())


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Nothing is collected within: the graphs of a runner that is no longer used are freed by calls
    that a capture forbids, and a destructor's error ends the process."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _inputs(batch: MicroBatch) -> tuple[Tensor, ...]:
    return (
        batch.input_ids,
        batch.position_ids,
        *batch.supervised,
        batch.labels,
        batch.segments.starts,
        *(() if batch.slots is None else (batch.slots.ends, batch.slots.supervised)),
    )


def _divisors(batch: MicroBatch) -> tuple[int, ...]:
    """Shape of what a pass's loss is divided by."""
    return () if batch.slots is None else (len(batch.slots.ends),)
