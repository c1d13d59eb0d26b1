"""How a group's step is cut into passes, and what its members share.

As `accumulate.py` for one run: the cut changes speed and memory, never a gradient, so a step that
ran out of memory may be taken again in smaller pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tunefork.data.example import Encoded
from tunefork.errors import NoMemoryError
from tunefork.train.accumulate import random_states, restore_random
from tunefork.train.runner import Runner
from tunefork.train.together_layout import passes


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """What the members of a group share."""

    micro_batch_tokens: int
    """Most tokens of a pass over all members, padding included."""
    packing: bool = True
    pad_id: int = 0
    on_out_of_memory: Literal["error", "shrink"] = "error"


class PassCut:
    """Of one group; `limit` falls where memory says so."""

    def __init__(self, runner: Runner, settings: GroupSettings) -> None:
        self.runner, self.settings = runner, settings
        self.limit = settings.micro_batch_tokens

    def gradient(self, chosen: Sequence[Sequence[Encoded]], counts_g: Tensor) -> Tensor:
        """Each slot's loss (G,), its gradient added up; in smaller passes where memory wants."""
        longest = max(len(example.input_ids) for own in chosen for example in own)
        random = random_states(self.runner.model.device)
        while True:
            limit = max(self.limit, longest)
            batches = passes(
                chosen,
                max_tokens=limit,
                packing=self.settings.packing,
                pad_id=self.settings.pad_id,
                in_segments=self.runner.head.takes_segments,
            )
            try:
                total_g = torch.zeros(len(counts_g), device=self.runner.model.device)
                for batch in batches:
                    rows, width = batch.input_ids.shape
                    where = f"a group's pass of {rows} x {width} tokens"
                    total_g += self.runner.loss(self.runner.lay_out(batch), counts_g, where)
                return total_g
            except NoMemoryError:
                is_least = self.settings.on_out_of_memory == "error" or limit == longest
                if is_least and not self.runner.graphs:
                    raise
            # Outside of `except`: the error holds the failed pass's tensors.
            if is_least:
                self.runner.without_graphs()
            else:
                self.runner.drop_graphs()
            for parameter in self.runner.trained:
                assert parameter.grad is not None
                parameter.grad.zero_()
            restore_random(random, self.runner.model.device)
            if self.runner.model.device.type == "cuda":
                torch.cuda.empty_cache()
            self.limit = limit if is_least else max(longest, limit // 2)
