"""A bank's slots as the tiers fill them: by threads, while passes read the other slots."""

from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

from tunefork.kernels.bank_mixed import Mixed
from tunefork.kernels.bank_read import Tiles, lay_out_tiles
from tunefork.kernels.bank_stretches import Layout, Stretch, lay_out
from tunefork.model.bank import Bank
from tunefork.serve.engines.adapter_file import HostAdapter
from tunefork.serve.engines.ferry import Ferry

_FERRY_BYTES = 16 << 20
_WIDENED = 300_000
"""Rows of A that all slots have for one layer, times tokens: 560 tokens of 33 slots of rank 16. By
count for an 8B model on an H200, whose products are then a tenth wider: at 512 tokens a millisecond
more, where tiles of 64 decoding rows read their A in 2.3; at 1,024 as much."""


class BankSlots:
    """The slots of one bank. On a GPU adapters come by a stream of their own."""

    def __init__(self, bank: Bank) -> None:
        self.bank, self.num_slots = bank, bank.num_slots
        self.ranks: dict[int, int] = {}
        """The largest rank in each slot."""
        layers = bank.layers.values()
        dtypes = {layer.dtype for layer in layers}
        self.most = min(torch.finfo(dtype).max for dtype in dtypes)
        """No value of an adapter may be above it."""
        self.few = _WIDENED // (self.num_slots * max(max(layer.ranks) for layer in layers))
        """Tokens of a pass with prompts up to which A of all slots is multiplied with the base."""
        self._laid_out: tuple[tuple[Stretch, ...], tuple[int, ...], Layout] | None = None
        """Of the last pass: most are of the same requests."""
        is_cuda = bank.device.type == "cuda"
        self.takes_tiles = is_cuda and dtypes == {torch.bfloat16}
        self._emptied: dict[int, torch.cuda.Event] = {}
        self._stream, self._ferry, self._loading = None, None, Lock()
        if is_cuda:
            self._stream = torch.cuda.Stream(bank.device)  # type: ignore[no-untyped-call]
            if self.takes_tiles:  # in fp32 they are kept in rows, which are written one by one
                largest = max(max(la.in_features, la.out_features) * max(la.ranks) for la in layers)
                num_bytes = max(_FERRY_BYTES, 2 * largest * torch.float64.itemsize)
                self._ferry = Ferry(num_bytes, bank.device, self._stream.synchronize)

    def route(
        self,
        index_n: Tensor,
        stretches: Sequence[Stretch],
        *,
        is_captured: bool = False,
        tiles: Tiles | Mixed | None = None,
    ) -> None:
        """The next pass's tokens: each one's slot in `index_n` (N,), and those with an adapter.

        `tiles` says the same of a captured pass with prompts.
        """
        if not stretches:
            self.bank.route_none()
        elif isinstance(tiles, Mixed):
            self.bank.route_mixed(tiles)
        elif tiles is not None:
            self.bank.route_tiles(tiles)
        elif is_captured:
            self.bank.route_tokens(index_n)
        elif self.takes_tiles:
            self.bank.route_tiles(lay_out_tiles(stretches, len(index_n), self.bank.device))
        else:
            ranks = tuple(self.ranks[stretch.slot] for stretch in stretches)
            if self._laid_out is None or self._laid_out[:2] != (tuple(stretches), ranks):
                self._laid_out = (tuple(stretches), ranks, lay_out(stretches, ranks))
            self.bank.route_stretches(self._laid_out[2])

    @torch.inference_mode()
    def load(self, slot: int, adapter: HostAdapter) -> None:
        """Put an adapter into `slot`; returns when it is there. Raises AdapterError."""
        self.ranks[slot] = adapter.rank
        if self._stream is None:
            self.bank.load(slot, adapter.deltas)
            return
        with self._loading, torch.cuda.stream(self._stream):
            if slot in self._emptied:  # a pass in flight may still read what was there
                self._stream.wait_event(self._emptied.pop(slot))
            try:
                if self._ferry is None:
                    self.bank.load(slot, adapter.deltas)
                else:
                    self.bank.load_parts(slot, adapter.deltas, self._ferry.carry(adapter.deltas))
            finally:  # nobody else takes the ferry before
                self._stream.synchronize()

    def clear(self, slot: int) -> None:
        """What is in `slot` is of no more use. It is overwritten by what comes next."""
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.bank.device))
            self._emptied[slot] = event
