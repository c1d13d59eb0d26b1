"""What a pass over many requests is told, laid out on the host and sent to the device in one copy.

The tensors stay where they are from pass to pass, so that a captured CUDA graph finds them. Rows
and tokens that only fill a pass up write to a token of the cache that nobody has.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunefork.kernels.bank_mixed import Mixed
from tunefork.kernels.bank_read import TILE, Tiles, cut
from tunefork.kernels.bank_stretches import Stretch
from tunefork.serve.engines.choose import Choice
from tunefork.serve.engines.launched import Follows
from tunefork.serve.engines.reads import Span

STEP = 8
"""A CPU's passes are filled up to a multiple of so many tokens: oneDNN compiles its products anew
for every number of them, and keeps them (`model/onednn.py`)."""
BASE = -1
"""The slot of tokens that no adapter is for."""
_ALIGNED = 4
"""Numbers in 16 bytes, at which kernels like tensors to begin."""


class Part(NamedTuple):
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
    choice: Choice | None = None
    """How the token that follows is drawn. None: the likeliest is chosen."""


class Layout:
    """The numbers of a pass, and where each kind of them lies in one tensor."""

    def __init__(self, tokens: int, rows: int, device: torch.device, *, few: int = 0) -> None:
        """`rows`: the most of a pass, the one with them that fills it up. `few`: up to so many
        tokens, rows that decode are in no tile."""
        self.rows, self.few = rows, few
        sizes = {
            "ids": tokens,
            "positions": tokens,
            "write": tokens,
            "slots": tokens,
            "last": rows,
            "starts_q": rows + 1,
            "starts_k": rows + 1,
            "used": rows,
            "decoding": rows,
            "starts_rest": rows + 1,
            "own": rows,
            "sources": rows,
            "tiles": 3 * self.most_tiles(tokens),
        }
        total, at = sum(size + -size % _ALIGNED for size in sizes.values()), 0
        self.is_cuda = device.type == "cuda"
        self.host = torch.zeros(total, dtype=torch.int32, pin_memory=self.is_cuda)
        self.device = self.host.to(device) if self.is_cuda else self.host
        numbers = self.host.numpy()
        self.numbers: dict[str, NDArray[np.int32]] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, size in sizes.items():
            self.numbers[name] = numbers[at : at + size]
            self.tensors[name] = self.device[at : at + size]
            at += size + -size % _ALIGNED

    def send(self, follows: Follows | None = None) -> None:
        """The host's numbers to the device; ids as `follows` has them."""
        rows = [] if follows is None else follows.rows
        self.numbers["sources"][: len(rows)] = rows
        if self.device is not self.host:
            self.device.copy_(self.host, non_blocking=True)
        if follows is not None:
            ids_r = follows.tokens_r.index_select(0, self.tensors["sources"][: len(rows)])
            # Below 0 is no token (`choose.BAD`): of its row nothing is told, but it is looked up.
            self.tensors["ids"][: len(rows)] = ids_r.clamp_(min=0)

    def lay_out_rows(self, parts: Sequence[Part], rows: int) -> int:
        """Parts of one token each that all want logits, filled up to `rows`. Returns how many
        tokens of the cache the longest sees.

        Between two of these a GPU has nothing to do, so it is done with few calls.
        """
        numbers, given = self.numbers, len(parts)
        position_r = np.zeros(rows, dtype=np.int32)
        position_r[:given] = [part.position for part in parts]
        start_r = np.zeros(rows, dtype=np.int32)
        start_r[:given] = [part.start for part in parts]
        numbers["ids"][:given] = [part.ids[0] for part in parts]
        numbers["ids"][given:rows] = 0
        numbers["slots"][:given] = [part.slot for part in parts]
        numbers["slots"][given:rows] = BASE
        numbers["positions"][:rows] = position_r
        numbers["write"][:rows] = start_r + position_r
        numbers["starts_k"][:rows] = start_r
        numbers["used"][:rows] = position_r + 1
        numbers["starts_q"][: rows + 1] = np.arange(rows + 1)
        numbers["last"][:rows] = np.arange(rows)
        return int(position_r.max()) + 1

    def lay_out(self, parts: Sequence[Part]) -> tuple[list[Span], int, int]:
        """Any parts. Returns their spans, how many tokens they are, and how many want logits."""
        numbers, rows = self.numbers, len(parts)
        told_r4 = [(len(part.ids), part.position, part.start, part.slot) for part in parts]
        new_r, position_r, start_r, slot_r = np.array(told_r4, np.int32).reshape(-1, 4).T
        used_r, end_r = position_r + new_r, new_r.cumsum(dtype=np.int32)
        first_r, at = end_r - new_r, int(new_r.sum())
        position_n = np.arange(at, dtype=np.int32) + np.repeat(position_r - first_r, new_r)
        numbers["ids"][:at] = [token for part in parts for token in part.ids]
        numbers["positions"][:at] = position_n
        numbers["write"][:at] = position_n + np.repeat(start_r, new_r)
        numbers["slots"][:at] = np.repeat(slot_r, new_r)
        numbers["starts_q"][:rows], numbers["starts_q"][rows] = first_r, at
        numbers["starts_k"][:rows] = start_r
        numbers["used"][:rows] = used_r
        wanted = [row for row, part in enumerate(parts) if part.wants_logits]
        numbers["last"][0] = 0  # a pass reads one row of logits, even where none is wanted
        numbers["last"][: len(wanted)] = end_r[wanted] - 1
        told = (first_r, new_r, start_r, used_r)
        spans = [Span(*one) for one in zip(*(one_r.tolist() for one_r in told), strict=True)]
        end = at if self.is_cuda or at == 1 else -(-at // STEP) * STEP
        for name in ("ids", "positions", "write"):
            numbers[name][at:end] = 0
        numbers["slots"][at:end] = BASE
        return spans, end, len(wanted)

    def fill_up(self, parts: Sequence[Part], num_wanted: int, tokens: int) -> None:
        """Fill the pass that lies here up to `tokens` tokens, all rows and all tiles.

        Those tokens belong to a row that sees nothing, not even them. The rows of one token that
        the pass begins with are told by themselves as well (`reads.Decoding`).
        """
        numbers, given = self.numbers, len(parts)
        at = int(numbers["starts_q"][given])
        for name in ("ids", "positions", "write"):
            numbers[name][at:tokens] = 0
        numbers["slots"][at:tokens] = BASE
        numbers["starts_q"][given + 1 :] = tokens
        numbers["starts_k"][given:] = 0
        numbers["used"][given:] = 0
        alone = next((at for at, part in enumerate(parts) if len(part.ids) > 1), given)
        numbers["decoding"][:alone], numbers["decoding"][alone:] = numbers["used"][:alone], 0
        np.maximum(numbers["starts_q"], alone, out=numbers["starts_rest"])
        numbers["own"][:alone], numbers["own"][alone:] = numbers["slots"][:alone], BASE
        numbers["last"][num_wanted:] = 0
        first = alone if tokens <= self.few else 0
        tiles = cut(stretches(parts[first:], first), tokens)
        if tokens <= self.few:
            tiles = [tile for tile in tiles if tile[0] != BASE]
        found = np.array(tiles, dtype=np.int32).ravel()
        numbers["tiles"][: len(found)] = found
        numbers["tiles"][len(found) :].reshape(-1, 3)[:] = (BASE, 0, 0)

    def most_tiles(self, tokens: int) -> int:
        """The most tiles of so many tokens: where each row has a slot of its own."""
        return (tokens + (TILE - 1) * self.rows) // TILE

    def tiles(self, tokens: int) -> Tiles | Mixed:
        """Where those of so many tokens lie."""
        most = self.most_tiles(tokens)
        numbers_t3 = self.tensors["tiles"][: 3 * most].view(most, 3)
        if tokens > self.few:
            return Tiles(numbers_t3)
        return Mixed(self.tensors["own"][: self.most_alone(tokens)], numbers_t3)

    def most_alone(self, tokens: int) -> int:
        """The most rows of one token that a pass of so many begins with."""
        return min(self.rows - 1, tokens)


def stretches(parts: Sequence[Part], first: int = 0) -> list[Stretch]:
    """The tokens that have an adapter, from `first` on, neighbours of one slot joined."""
    ends = [first]
    for part in parts:
        ends.append(ends[-1] + len(part.ids))
    found: list[Stretch] = []
    for part, (begin, end) in zip(parts, pairwise(ends), strict=True):
        if part.slot == BASE:
            continue
        if found and found[-1].last == begin and found[-1].slot == part.slot:
            found[-1] = found[-1]._replace(last=end)
        else:
            found.append(Stretch(part.slot, begin, end))
    return found
