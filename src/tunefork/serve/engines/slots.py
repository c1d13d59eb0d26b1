"""A bank's slots as the tiers fill them: by threads, while passes read the other slots."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunefork.kernels.bank_rows import Layout, lay_out
from tunefork.kernels.bank_stretches import Stretch, lay_out_sorted
from tunefork.model.bank import Bank
from tunefork.serve.engines.adapter_file import HostAdapter


class BankSlots:
    """The slots of one bank. On a GPU adapters come by a stream of their own."""

    def __init__(self, bank: Bank) -> None:
        self.bank, self.num_slots = bank, bank.num_slots
        self.ranks: dict[int, int] = {}
        """The largest rank in each slot."""
        self.dtype = next(iter(bank.layers.values())).dtype
        self.sorts_tokens = bank.device.type == "cuda" and self.dtype == torch.bfloat16
        self._laid_out: tuple[tuple[Stretch, ...], tuple[int, ...], Layout] | None = None
        """Of the last pass on a CPU: most are of the same requests."""
        self._emptied: dict[int, torch.cuda.Event] = {}
        is_cuda = bank.device.type == "cuda"
        self._stream = torch.cuda.Stream(bank.device) if is_cuda else None  # type: ignore[no-untyped-call]

    def route(
        self, index_n: Tensor, stretches: Sequence[Stretch], *, is_captured: bool = False
    ) -> None:
        """The next pass's tokens: each one's slot in `index_n` (N,), and those with an adapter.

        In bf16 on a GPU these come in the order of their slots, before those without one, unless
        the pass is captured.
        """
        device = self.bank.device
        if not stretches:
            self.bank.route_none()
        elif is_captured:
            self.bank.route_tokens(index_n)
        elif self.sorts_tokens:
            self.bank.route_stretches(lay_out_sorted(stretches, self.num_slots, device))
        else:
            ranks = tuple(self.ranks[stretch.slot] for stretch in stretches)
            if self._laid_out is None or self._laid_out[:2] != (tuple(stretches), ranks):
                self._laid_out = (tuple(stretches), ranks, lay_out(stretches, ranks))
            self.bank.route_rows(self._laid_out[2])

    @torch.inference_mode()
    def load(self, slot: int, adapter: HostAdapter) -> None:
        """Put an adapter into `slot`; returns when it is there. Raises AdapterError."""
        self.ranks[slot] = adapter.rank
        if self._stream is None:
            self.bank.load_ready(slot, adapter.matrices)
            return
        with torch.cuda.stream(self._stream):
            if slot in self._emptied:  # a pass in flight may still read what was there
                self._stream.wait_event(self._emptied.pop(slot))
            self.bank.load_ready(slot, adapter.matrices)
        self._stream.synchronize()

    def clear(self, slot: int) -> None:
        """What is in `slot` is of no more use. It is overwritten by what comes next."""
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.bank.device))
            self._emptied[slot] = event
