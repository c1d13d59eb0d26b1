"""One pass of the model over many requests: launched, or a captured one replayed (`graphs.py`).

Most passes are replayed: those of rows that decode, filled up to one of few numbers of rows, and
those with prompts, filled up to one of few numbers of tokens. Longer ones, a CPU's, and those of a
GPU without FlashAttention are launched kernel by kernel.

Shape legend: N tokens of the pass, R rows of which logits are wanted, V tokens of the vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunefork.kernels.bank_mixed import Mixed
from tunefork.kernels.bank_read import Tiles
from tunefork.kernels.bank_stretches import Stretch
from tunefork.kernels.draw import Draw, draw
from tunefork.serve.engines.choose import draw_rows, greedy
from tunefork.serve.engines.compiled_layers import CompiledLayers
from tunefork.serve.engines.graphs import MANY_ROWS, Graphs, Key, limited
from tunefork.serve.engines.launched import Arriving, Follows, Launched
from tunefork.serve.engines.layout import BASE, STEP, Layout, Part, stretches
from tunefork.serve.engines.reads import Decoding, Reads, Span
from tunefork.serve.engines.trial import TRIED


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the model gives; in tensors that the next pass overwrites."""

    logits_rv: Tensor
    tokens_r: Tensor
    """The likeliest, as `choose.greedy`."""


class _Shape(NamedTuple):
    """The sizes of a pass."""

    rows: int
    num_tokens: int
    num_wanted: int
    longest_q: int | None
    """As `Reads`."""
    longest_k: int


class Route(Protocol):
    """Is told whose the tokens of the next pass are."""

    def __call__(
        self,
        index_n: Tensor,
        stretches: Sequence[Stretch],
        *,
        is_captured: bool = False,
        tiles: Tiles | Mixed | None = None,
    ) -> None:
        """The slot of each token, and the stretches of tokens that have one.

        A captured pass reads `index_n` whenever it is replayed, or where prompts are in it `tiles`.
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
        groups: Collection[int] = (),
        apart: bool = True,
        few: int = 0,
        tries: bool = True,
        draw_by: Draw = draw,
    ) -> None:
        """`groups`: how many query heads share a key-value head, where many rows of one token are
        as quick if they are grouped by these beforehand. `apart`: beside prompts too. `few`: as
        `Layout`. `tries`: passes with prompts have room for a trial, which all of them compute."""
        self.model, self.route, self.flash, self.groups = model, route, flash, groups
        self.apart, self.tries, self.draw_by = apart, tries, draw_by
        self.rows_are_alike = False
        """Of captured passes with prompts, equal rows at two places: as far as was seen."""
        self.max_tokens, self.max_rows, self.max_model_len = max_tokens, max_rows, max_model_len
        self.device = model.device
        # A trial's tokens are among those of prompts, its rows are none of the requests'.
        rows = max_rows + (TRIED if tries else 0) + 1
        self.layout = Layout(max_tokens + max_rows + STEP, rows, self.device, few=few)
        self.graphs: Graphs | None = None
        if graphs:
            compiled = CompiledLayers(model) if compiles else None
            self.graphs = self.make_graphs(max_rows, compiled)
        self._read: torch.cuda.Event | None = None

    def make_graphs(self, max_rows: int, compiled: CompiledLayers | None) -> Graphs:
        """Of this model's passes; none is captured yet."""
        return Graphs(
            self.launch,
            self.device,
            max_rows=max_rows,
            max_tokens=self.max_tokens,
            max_model_len=self.max_model_len,
            compiled=compiled,
        )

    @property
    def has_graphs(self) -> bool:
        """Decoding passes are replayed."""
        return self.graphs is not None and self.graphs.is_on

    def takes_trial(self, tokens: int) -> bool:
        """A trial's rows may be in a pass of so many tokens, theirs with them."""
        is_captured = self.graphs is not None and self.graphs.size(tokens) is not None
        return is_captured and self.rows_are_alike

    @torch.inference_mode()
    def run(self, parts: Sequence[Part], follows: Follows | None = None) -> Launched:
        """Logits of the parts that want them, in order. Nothing waits for the GPU.

        `follows`: where the ids of the first parts are, in place of those in the parts.
        """
        if self._read is not None:
            self._read.synchronize()  # the last pass's numbers must have been read
        if self.graphs and all(part.wants_logits and len(part.ids) == 1 for part in parts):
            outcome, wanted = self._run_rows(self.graphs, parts, follows), len(parts)
        elif self.graphs and (size := self.graphs.size(sum(len(part.ids) for part in parts))):
            outcome, wanted = self._run_filled(self.graphs, parts, follows, size)
        else:
            outcome, wanted = self._run_any(parts, follows)
        logits_rv, tokens_r = outcome.logits_rv[:wanted], outcome.tokens_r[:wanted].clone()
        told = enumerate(part.choice for part in parts if part.wants_logits)
        choices = {row: choice for row, choice in told if choice is not None}
        draw_rows(logits_rv, tokens_r, choices, self.draw_by)
        return Launched(logits_rv, tokens_r, Arriving(tokens_r))

    def warm(self, *, has_slots: bool) -> None:
        """Capture the graphs that short requests need, so that the first ones do not wait."""

        def lay_out(key: Key) -> None:
            if key.tokens:
                self.layout.lay_out([])
                self.layout.fill_up([], 0, key.tokens)
            else:
                self.layout.lay_out_rows([], key.rows)
            self.layout.send()

        if self.graphs:
            self.graphs.warm(lay_out, has_slots=has_slots)

    def read_as_one(self) -> None:
        """From the next `warm` on: rows that decode and prompts, by one call and by tiles."""
        self.apart, self.layout.few = False, 0
        if self.graphs:
            self.graphs.forget_prompts()

    def launch(self, key: Key) -> Outcome:
        """Launch the pass that lies in the layout, filled up."""
        tokens = key.tokens or key.rows
        shape = _Shape(key.rows, tokens, key.rows, 1, key.longest_k)
        if key.tokens:  # one row more, which fills it up
            rows = self.layout.rows
            shape = shape._replace(rows=rows, num_wanted=rows - 1, longest_q=None)
        told = [Stretch(0, 0, tokens)] if key.has_adapters else []
        return self._pass(shape, told, None, is_captured=True)

    def _run_rows(self, graphs: Graphs, parts: Sequence[Part], follows: Follows | None) -> Outcome:
        longest_k = self.layout.lay_out_rows(parts, graphs.filled(len(parts)))
        self._send(follows)
        has_adapters = any(part.slot != BASE for part in parts)
        outcome: Outcome = graphs.outcome(
            graphs.key(len(parts), longest_k, has_adapters=has_adapters)
        )
        return outcome

    def _run_filled(
        self, graphs: Graphs, parts: Sequence[Part], follows: Follows | None, size: int
    ) -> tuple[Outcome, int]:
        """Parts of any length as a captured pass of `size` tokens."""
        _, _, num_wanted = self.layout.lay_out(parts)
        self.layout.fill_up(parts, num_wanted, size)
        self._send(follows)
        return graphs.outcome(graphs.key_of_tokens(size)), num_wanted

    def _run_any(self, parts: Sequence[Part], follows: Follows | None) -> tuple[Outcome, int]:
        spans, num_tokens, num_wanted = self.layout.lay_out(parts)
        self._send(follows)
        longest_q = max(span.new for span in spans)
        longest_k = min(limited(max(span.used for span in spans)), self.max_model_len)
        shape = _Shape(len(parts), num_tokens, num_wanted, longest_q, longest_k)
        return self._pass(shape, stretches(parts), None if self.flash else tuple(spans)), num_wanted

    def _send(self, follows: Follows | None) -> None:
        self.layout.send(follows)
        if self.device.type == "cuda":
            self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._read.record()

    def _pass(
        self,
        shape: _Shape,
        told: Sequence[Stretch],
        spans: tuple[Span, ...] | None,
        *,
        is_captured: bool = False,
    ) -> Outcome:
        """`spans` for `sdpa`, None for `flash`."""
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
        tiles = None
        if shape.longest_q is None:
            tiles = self.layout.tiles(num_tokens)
            self._read_apart(reads, num_tokens)
        elif is_captured and shape.rows >= MANY_ROWS:
            reads.grouped.update({groups: reads.starts_q * groups for groups in self.groups})
        index_n = tensors["slots"][:num_tokens]
        if self.graphs and self.graphs.compiled:
            for told_of in (index_n, *(tiles or ())):
                if isinstance(told_of, Tensor):
                    self.graphs.compiled.mark(told_of)  # which no layer is handed
        self.route(index_n, told, is_captured=is_captured, tiles=tiles)
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

    def _read_apart(self, reads: Reads, num_tokens: int) -> None:
        """Have `flash` group heads in the rows of one token that a pass with prompts begins with.

        Among many such rows: of few, long ones are read sooner head by head, beside the prompts.
        """
        if self.layout.rows <= MANY_ROWS or not self.groups or not self.apart:
            return
        tensors, many = self.layout.tensors, self.layout.most_alone(num_tokens)
        reads.decoding = Decoding(tensors["decoding"][:many], tensors["starts_rest"])
        at_m = torch.arange(many + 1, dtype=torch.int32, device=self.device)
        reads.grouped.update({groups: at_m * groups for groups in self.groups})
