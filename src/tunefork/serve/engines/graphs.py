"""Decoding passes as CUDA graphs: launching the kernels of a large model one by one takes the host
longer than the GPU needs for them.

A pass is filled up to one of few numbers of rows; for each of them there is a graph with and one
without adapters, captured before the first request comes, and for longer texts when they come. What
cannot be captured is launched: first without compiled layers, then kernel by kernel.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tunefork.serve.engines.compiled_layers import CompiledLayers

MANY_ROWS = 32
"""From so many rows on, attention has enough to do without cutting long ones into pieces."""
_FEWEST = 2
"""Rows: of one, a compiled layer would have forms of its own."""


class Key(NamedTuple):
    """What a graph was captured for."""

    rows: int
    longest_k: int
    has_adapters: bool
    """Without any, the base is spared their products."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured pass, and where its outcome is found after each replay."""

    graph: Any
    outcome: Any


class Graphs:
    """Captures `run(key)`, which launches a pass over the numbers that lie in the layout."""

    def __init__(
        self,
        run: Callable[[Key], Any],
        device: torch.device,
        *,
        max_rows: int,
        max_model_len: int,
        compiled: CompiledLayers | None,
    ) -> None:
        self.run, self.device, self.compiled = run, device, compiled
        self.max_rows, self.max_model_len = max_rows, max_model_len
        self.captured: dict[Key, Graph] = {}
        self.is_on = True

    def key(self, rows: int, longest_k: int, *, has_adapters: bool) -> Key:
        """Of a pass of so many rows, of which the longest sees `longest_k` tokens."""
        filled = self.filled(rows)
        limit = self.max_model_len if filled >= MANY_ROWS else limited(longest_k)
        return Key(filled, min(limit, self.max_model_len), has_adapters)

    def filled(self, rows: int) -> int:
        """Up to which number of rows a pass is filled: powers of two, then eights."""
        size = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
        return min(max(size, _FEWEST), self.max_rows)

    def outcome(self, key: Key) -> Any:
        """Of the pass that lies in the layout. A GPU has not computed it yet."""
        if not self.is_on:
            return self.run(key)
        if key not in self.captured:
            try:
                self.captured[key] = self._capture(key)
            except torch.OutOfMemoryError:
                raise  # of this pass: it is no word on the others
            except Exception as error:
                self._do_without(error)
                return self.outcome(key)
        graph = self.captured[key]
        graph.graph.replay()
        return graph.outcome

    @torch.inference_mode()
    def warm(self, lay_out: Callable[[int], None], *, has_slots: bool) -> None:
        """Capture what short requests need; `lay_out(rows)` lays out a pass of nobody's rows."""
        sizes = sorted({self.filled(rows) for rows in range(1, self.max_rows + 1)}, reverse=True)
        for rows in sizes:  # the largest first: the others find room in its memory
            lay_out(rows)
            for has_adapters in (False, True) if has_slots else (False,):
                self.outcome(self.key(rows, 1, has_adapters=has_adapters))
                torch.cuda.synchronize(self.device)

    def _do_without(self, error: Exception) -> None:
        """Without compiled layers, or without graphs, from now on; every graph anew."""
        what, instead = "embedded.cuda_graphs", "passes are launched kernel by kernel"
        if self.compiled is not None:
            what, instead = "embedded.compile", "layers run as written"
            self.compiled.remove()
            self.compiled = None
        else:
            self.is_on = False
        self.captured.clear()
        why = (str(error).splitlines() or [""])[0][:200]
        warnings.warn(
            f"{what}: a decoding pass could not be captured ({type(error).__name__}: {why}); "
            f"{instead}, which is slower",
            stacklevel=2,
        )

    def _capture(self, key: Key) -> Graph:
        """The graph of a pass, by the numbers that lie there now."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        pool = next(iter(self.captured.values())).graph.pool() if self.captured else None
        if self.compiled is not None:
            self.compiled.is_on = True
        try:
            with torch.cuda.stream(stream):
                self.run(key)  # what is made at the first call is made outside of the graph
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads (one that loads adapters) may use the GPU meanwhile.
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                outcome = self.run(key)
        finally:
            if self.compiled is not None:
                self.compiled.is_on = False
        return Graph(graph, outcome)


def limited(tokens: int) -> int:
    """`tokens` up to one of few lengths, for which graphs are captured."""
    size = 512
    while size < tokens:
        size *= 4
    return size
