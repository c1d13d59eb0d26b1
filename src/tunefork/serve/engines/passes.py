"""One pass of the model over many requests: laid out, launched or replayed as a CUDA graph.

What a pass is told goes to the device in one copy, into tensors that stay where they are. A pass in
which every row decodes one token is filled up to one of few numbers of rows, and replayed as a CUDA
graph where there is a GPU: launching the kernels of a large model one by one takes the host longer
than the GPU needs for them. Rows that only fill up write to a token of the cache that nobody has.

Shape legend: N tokens of the pass, R rows of which logits are wanted, V tokens of the vocabulary.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.kernels.bank_stretches import Stretch
from tunefork.model.layers import decoder_layers
from tunefork.serve.engines.attention import Reads, Span
from tunefork.serve.engines.choose import greedy

_MANY_ROWS = 32
_STEP = 8
"""A CPU's passes are filled up to a multiple of so many tokens: oneDNN compiles its products anew
for every number of them, and keeps them (about 1.5 MB each)."""
BASE = -1
"""The slot of tokens that no adapter is for."""


@dataclass(frozen=True, slots=True)
class Part:
    """One request's part of a pass."""

    ids: Sequence[int]
    """Its new tokens."""
    position: int
    """Of the first of them: how many are in the cache already."""
    start: int
    """Where its region begins in the cache."""
    slot: int
    wants_logits: bool
    """Of its last token."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a pass gives; in tensors that the next pass overwrites."""

    logits_rv: Tensor
    tokens_r: Tensor
    """The likeliest, as `choose.greedy`."""


class _Layout:
    """The numbers of a pass, and where each kind of them lies in one tensor."""

    def __init__(self, tokens: int, rows: int, device: torch.device) -> None:
        sizes = {
            "ids": tokens,
            "positions": tokens,
            "write": tokens,
            "slots": tokens,
            "last": rows,
            "starts_q": rows + 1,
            "starts_k": rows + 1,
            "used": rows,
        }
        total, at = sum(sizes.values()), 0
        is_cuda = device.type == "cuda"
        self.host = torch.zeros(total, dtype=torch.int32, pin_memory=is_cuda)
        self.device = torch.zeros(total, dtype=torch.int32, device=device) if is_cuda else self.host
        numbers = self.host.numpy()
        self.numbers: dict[str, NDArray[np.int32]] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, size in sizes.items():
            self.numbers[name] = numbers[at : at + size]
            self.tensors[name] = self.device[at : at + size]
            at += size

    def send(self) -> None:
        """The host's numbers to the device."""
        if self.device is not self.host:
            self.device.copy_(self.host, non_blocking=True)


class _Key(NamedTuple):
    """What a graph was captured for."""

    rows: int
    longest_k: int
    has_adapters: bool
    """Without any, the base is spared their products."""


class _Shape(NamedTuple):
    """The sizes of a pass."""

    rows: int
    num_tokens: int
    num_wanted: int
    longest_q: int
    longest_k: int


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: Any
    outcome: Outcome


class Route(Protocol):
    """Is told whose the tokens of the next pass are."""

    def __call__(
        self, index_n: Tensor, stretches: Sequence[Stretch], *, is_captured: bool = False
    ) -> None:
        """The slot of each token, and the stretches of tokens that have one.

        A captured pass reads `index_n` whenever it is replayed.
        """


class Passes:
    """Runs passes of one model; `route` is called before each, and before each capture."""

    def __init__(
        self,
        model: PreTrainedModel,
        route: Route,
        *,
        max_tokens: int,
        max_rows: int,
        max_model_len: int,
        flash: bool,
        graphs: bool,
        compiles: bool = False,
    ) -> None:
        self.model, self.route, self.flash, self.graphs = model, route, flash, graphs
        self.max_model_len = max_model_len
        self.device = model.device
        tokens = max_tokens + max_rows + _STEP
        self.layout = _Layout(tokens, max_rows, self.device)
        self.captured: dict[_Key, _Graph] = {}
        self.max_rows = max_rows
        self._read: torch.cuda.Event | None = None
        self._is_decoding = False
        if compiles:
            self._compile()

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> Outcome:
        """Logits of the parts that want them, in order. Nothing waits for the GPU."""
        if self._read is not None:
            self._read.synchronize()  # the last pass's numbers must have been read
        decodes = all(len(part.ids) == 1 and part.wants_logits for part in parts)
        rows = self.filled(len(parts)) if decodes and self.graphs else len(parts)
        spans, num_tokens, num_wanted = self._lay_out(parts, rows)
        stretches = _stretches(parts)
        longest_q = max(span.new for span in spans)
        longest_k = _limit(max(span.used for span in spans), self.max_model_len)
        self.layout.send()
        if self.device.type == "cuda":
            self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._read.record()
        if decodes and self.graphs:
            # With many rows the kernel has enough to do without cutting them into pieces.
            limit = longest_k if rows < _MANY_ROWS else self.max_model_len
            outcome = self._replay(_Key(rows, limit, bool(stretches)))
        else:
            told = None if self.flash else tuple(spans)
            shape = _Shape(rows, num_tokens, num_wanted, longest_q, longest_k)
            outcome = self._pass(shape, stretches, told)
        return Outcome(outcome.logits_rv[:num_wanted], outcome.tokens_r[:num_wanted])

    @torch.inference_mode()
    def warm(self, *, has_slots: bool) -> None:
        """Capture the graphs that short requests need, so that the first ones do not wait."""
        sizes = sorted({self.filled(rows) for rows in range(1, self.max_rows + 1)}, reverse=True)
        for rows in sizes:  # the largest first: the others find room in its memory
            self._lay_out([], rows)
            self.layout.send()
            for has_adapters in (False, True) if has_slots else (False,):
                limit = self.max_model_len if rows >= _MANY_ROWS else _limit(1, self.max_model_len)
                try:
                    self._replay(_Key(rows, limit, has_adapters))
                    torch.cuda.synchronize(self.device)
                except RuntimeError as error:
                    self._is_decoding, self.graphs = False, False
                    self.captured.clear()
                    warnings.warn(
                        "embedded.cuda_graphs: a decoding pass could not be captured "
                        f"({str(error).splitlines()[0]}); passes are launched kernel by kernel, "
                        "which is slower",
                        stacklevel=2,
                    )
                    return

    def filled(self, rows: int) -> int:
        """Up to which number of rows a decoding pass is filled: powers of two, then eights."""
        size = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
        return min(size, self.max_rows)

    def _lay_out(self, parts: Sequence[Part], rows: int) -> tuple[list[Span], int, int]:
        """Write the pass's numbers on the host. Returns spans, tokens, and how many want logits."""
        numbers, at, wanted = self.layout.numbers, 0, 0
        spans = []
        for row, part in enumerate(parts):
            new = len(part.ids)
            numbers["ids"][at : at + new] = part.ids
            if new == 1:
                numbers["positions"][at] = part.position
                numbers["write"][at] = part.start + part.position
            else:
                run = np.arange(part.position, part.position + new, dtype=np.int32)
                numbers["positions"][at : at + new] = run
                numbers["write"][at : at + new] = run + part.start
            numbers["slots"][at : at + new] = part.slot
            spans.append(Span(at, new, part.start, part.position + new))
            numbers["starts_q"][row] = at
            numbers["starts_k"][row] = part.start
            numbers["used"][row] = part.position + new
            at += new
            if part.wants_logits:
                numbers["last"][wanted] = at - 1
                wanted += 1
        for row in range(len(parts), rows):
            for name in ("ids", "positions", "write"):
                numbers[name][at] = 0
            numbers["slots"][at] = BASE
            numbers["starts_q"][row], numbers["starts_k"][row], numbers["used"][row] = at, 0, 1
            numbers["last"][row] = at
            at += 1
        numbers["starts_q"][rows] = at
        numbers["starts_k"][rows] = 0
        end = at if self.device.type == "cuda" else -(-at // _STEP) * _STEP if at > 1 else at
        for name in ("ids", "positions", "write"):
            numbers[name][at:end] = 0
        numbers["slots"][at:end] = BASE
        return spans, end, wanted

    def _pass(
        self,
        shape: _Shape,
        stretches: Sequence[Stretch],
        spans: tuple[Span, ...] | None,
        *,
        is_captured: bool = False,
    ) -> Outcome:
        """`spans` for `attention.sdpa`, None for `flash`."""
        tensors, num_tokens = self.layout.tensors, shape.num_tokens
        reads = Reads(
            tensors["write"][:num_tokens].long(),
            tensors["starts_q"][: shape.rows + 1],
            tensors["starts_k"][: shape.rows + 1],
            tensors["used"][: shape.rows],
            shape.longest_q,
            shape.longest_k,
            spans,
        )
        self.route(tensors["slots"][:num_tokens], stretches, is_captured=is_captured)
        # A pass that only fills the cache wants no logits at all; one row keeps shapes plain.
        wanted = tensors["last"][: max(shape.num_wanted, 1)].long()
        logits_rv = self.model(
            input_ids=tensors["ids"][None, :num_tokens].long(),
            position_ids=tensors["positions"][None, :num_tokens].long(),
            use_cache=False,
            logits_to_keep=wanted,
            reads=reads,
        ).logits[0]
        return Outcome(logits_rv, greedy(logits_rv))

    def _replay(self, key: _Key) -> Outcome:
        if key not in self.captured:
            self.captured[key] = self._capture(key)
        graph = self.captured[key]
        graph.graph.replay()
        return graph.outcome

    def _capture(self, key: _Key) -> _Graph:
        """The graph of a pass over so many decoding rows, by the numbers that lie there now."""
        rows = key.rows
        shape = _Shape(rows, rows, rows, 1, key.longest_k)
        stretches = [Stretch(0, 0, rows)] if key.has_adapters else []
        run = partial(self._pass, shape, stretches, None, is_captured=True)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        self._is_decoding = True
        with torch.cuda.stream(stream):
            run()  # what is made at the first call is made outside of the graph
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.captured.values())).graph.pool() if self.captured else None
        # Other threads (one that loads adapters) may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outcome = run()
        self._is_decoding = False
        return _Graph(graph, outcome)

    def _compile(self) -> None:
        """Decoder layers of captured passes run compiled; one form serves all layers and sizes."""

        def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return type(layer).forward(layer, *args, **kwargs)

        compiled = torch.compile(forward, dynamic=True)

        def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (compiled if self._is_decoding else forward)(layer, *args, **kwargs)

        for layer in decoder_layers(self.model):
            layer.forward = partial(run, layer)


def _stretches(parts: Sequence[Part]) -> list[Stretch]:
    """The tokens that have an adapter, neighbours of one slot joined."""
    found: list[Stretch] = []
    at = 0
    for part in parts:
        end = at + len(part.ids)
        if part.slot != BASE:
            if found and found[-1].last == at and found[-1].slot == part.slot:
                found[-1] = found[-1]._replace(last=end)
            else:
                found.append(Stretch(part.slot, at, end))
        at = end
    return found


def _limit(tokens: int, most: int) -> int:
    """`tokens` up to one of few lengths, for which graphs are captured."""
    size = 512
    while size < tokens:
        size *= 4
    return min(size, most)
