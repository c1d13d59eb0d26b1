"""Passes as CUDA graphs: launching the kernels of a large model one by one takes the host longer
than the GPU needs for them.

A decoding pass is filled up to one of few numbers of rows; for each of them there is a graph with
and one without adapters, captured before the first request comes, and for longer texts when they
come. A pass with prompts is filled up to one of few numbers of tokens, and its graph serves any
rows of any length, with and without adapters: the kernels of attention and of adapters look up
where each row's tokens are, in grids as large as any such rows may need. What cannot be captured is
launched: first without compiled layers, then kernel by kernel.
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
_SIZES = (64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792)
"""Tokens of passes with prompts, below the most; above them `_STEP` by `_STEP`. Up to some 256 of
them a GPU waits for the weights anyway; from there on 256 tokens of an 8B model are 6 ms, by count
(H200)."""
_STEP = 256
_MOST_TOKENS = 2048
"""Prompts' tokens of a captured pass: for many more the GPU takes longer than the host."""
_LAUNCHED = "passes are launched kernel by kernel"


class Key(NamedTuple):
    """What a graph was captured for."""

    rows: int
    longest_k: int
    has_adapters: bool
    """Without any, the base is spared their products."""
    tokens: int = 0
    """Of a pass with prompts; 0: of rows of one token."""


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
        max_tokens: int,
        max_model_len: int,
        compiled: CompiledLayers | None,
    ) -> None:
        """`max_tokens` of prompts."""
        self.run, self.device, self.compiled = run, device, compiled
        self.max_rows, self.max_model_len = max_rows, max_model_len
        most = min(max_tokens, _MOST_TOKENS) + max_rows
        sizes = (*_SIZES, *range(_SIZES[-1] + _STEP, most - _STEP + 1, _STEP))
        self.sizes = [*(size for size in sizes if size < most), most]
        """Tokens of passes with prompts that are captured."""
        self.captured: dict[Key, Graph] = {}
        self._pool: Any = None
        """Memory that graphs share. None: the next one has its own."""
        self.is_on = True
        self.compiles_prompts = compiled is not None

    def key(self, rows: int, longest_k: int, *, has_adapters: bool) -> Key:
        """Of a pass of so many rows, of which the longest sees `longest_k` tokens."""
        filled = self.filled(rows)
        limit = self.max_model_len if filled >= MANY_ROWS else limited(longest_k)
        return Key(filled, min(limit, self.max_model_len), has_adapters)

    def filled(self, rows: int) -> int:
        """Up to which number of rows a pass is filled: powers of two, then eights."""
        size = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
        return min(max(size, _FEWEST), self.max_rows)

    def size(self, tokens: int) -> int | None:
        """Up to which number of tokens a pass with prompts is filled; None: it is not captured."""
        sizes = self.sizes if self.is_on else []
        return next((size for size in sizes if size >= tokens), None)

    def key_of_tokens(self, size: int) -> Key:
        """Of a pass with prompts. How many tokens a row sees takes no part in a kernel's launch."""
        return Key(self.max_rows, self.max_model_len, has_adapters=True, tokens=size)

    @property
    def captured_tokens(self) -> int:
        """Of the largest captured pass with prompts; 0: there is none."""
        return max((key.tokens for key in self.captured), default=0)

    def forget_prompts(self) -> None:
        """Passes with prompts are to be captured anew."""
        self.captured = {key: graph for key, graph in self.captured.items() if not key.tokens}

    def outcome(self, key: Key) -> Any:
        """Of the pass that lies in the layout. A GPU has not computed it yet."""
        if not self.is_on or (key.tokens and key.tokens not in self.sizes):
            return self.run(key)
        if key not in self.captured:
            try:
                self.captured[key] = self._capture(key)
            except torch.OutOfMemoryError:
                raise  # of this pass: it is no word on the others
            except Exception as error:
                self._do_without(error, key)
                return self.outcome(key)
        graph = self.captured[key]
        graph.graph.replay()
        return graph.outcome

    @torch.inference_mode()
    def warm(self, lay_out: Callable[[Key], None], *, has_slots: bool) -> None:
        """Capture what short requests need; `lay_out(key)` lays out a pass of nobody's tokens."""
        sizes = sorted({self.filled(rows) for rows in range(1, self.max_rows + 1)}, reverse=True)
        for rows in sizes:  # the largest first: the others find room in its memory
            for has_adapters in (False, True) if has_slots else (False,):
                self._warm(self.key(rows, 1, has_adapters=has_adapters), lay_out)
        for size in self.sizes[::-1]:
            if size not in self.sizes:  # another could not be captured
                break
            try:
                self._warm(self.key_of_tokens(size), lay_out)
            except torch.OutOfMemoryError as error:  # the next larger one may be there
                self.sizes = [one for one in self.sizes if one != size]
                torch.cuda.empty_cache()
                _warn("embedded.cuda_graphs", f"a pass of {size} tokens", error, _LAUNCHED)

    def _warm(self, key: Key, lay_out: Callable[[Key], None]) -> None:
        lay_out(key)
        self.outcome(key)
        torch.cuda.synchronize(self.device)

    def _do_without(self, error: Exception, key: Key) -> None:
        """Without compiled layers, or without graphs, from now on, passes of the kind of `key`."""
        what, instead = "embedded.compile", "layers run as written"
        if key.tokens and self.compiled is not None and self.compiles_prompts:
            self.compiles_prompts = False
        elif not key.tokens and self.compiled is not None:
            self.compiled.remove()
            self.compiled = None
        else:
            what, instead = "embedded.cuda_graphs", _LAUNCHED
            self.sizes, self.is_on = [], self.is_on and bool(key.tokens)
        self.captured = {
            one: graph
            for one, graph in self.captured.items()
            if self.is_on and bool(one.tokens) != bool(key.tokens)
        }
        # PyTorch may take a capture that failed for one still under way, and its memory for taken.
        self._pool = None
        kind = f"a pass of {key.tokens} tokens" if key.tokens else "a decoding pass"
        _warn(what, kind, error, instead)

    def _capture(self, key: Key) -> Graph:
        """The graph of a pass, by the numbers that lie there now."""
        current = torch.cuda.current_stream(self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        if self.compiled is not None and (self.compiles_prompts or not key.tokens):
            self.compiled.is_on = True
        graph = torch.cuda.CUDAGraph()
        try:
            try:
                with torch.cuda.stream(stream):
                    self.run(key)  # what is made at the first call is made outside of the graph
            finally:  # where it raised, too: what it launched by then reads the layout
                current.wait_stream(stream)
            # Other threads (one that loads adapters) may use the GPU meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                outcome = self.run(key)
        finally:
            torch.cuda.set_stream(current)  # PyTorch leaves a capture's where it could not end it
            if self.compiled is not None:
                self.compiled.is_on = False
        self._pool = graph.pool()
        return Graph(graph, outcome)


def _warn(what: str, kind: str, error: Exception, instead: str) -> None:
    why = (str(error).splitlines() or [""])[0][:200]
    warnings.warn(
        f"{what}: {kind} could not be captured ({type(error).__name__}: {why}); {instead}, which "
        "is slower",
        stacklevel=2,
    )


def limited(tokens: int) -> int:
    """`tokens` up to one of few lengths, for which graphs are captured."""
    size = 512
    while size < tokens:
        size *= 4
    return size
