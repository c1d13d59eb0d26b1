"""The loss of many members of a group on the same examples, in common passes.

What early stopping and a ranking of variants measure again and again: one reading of the base's
weights serves all of them. As every evaluation, it draws nothing and changes no state.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunefork.data.example import Encoded
from tunefork.train.kernels import attention_kernels
from tunefork.train.loss import token_losses
from tunefork.train.together import Group
from tunefork.train.together_layout import passes


@torch.no_grad()
def group_losses(
    group: Group, names: Sequence[str], examples: Sequence[Encoded]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each member: each example's summed loss (N,), fp64, nats, and supervised tokens (N,)."""
    slots = [group.slot_of(name) for name in names]
    totals = torch.zeros(group.bank.num_slots, len(examples), dtype=torch.float64)
    counts = torch.tensor([int(example.supervised[1:].sum()) for example in examples])
    model, bank, settings = group.model, group.bank, group.settings
    batches = passes(
        [examples if slot in slots else () for slot in range(bank.num_slots)],
        max_tokens=settings.micro_batch_tokens,
        packing=settings.packing,
        pad_id=settings.pad_id,
    )
    model.eval()
    try:
        with attention_kernels():
            for batch in batches:
                assert batch.slots is not None
                bank.route_segments(batch.slots.bounds, batch.slots.ends)
                losses_s = token_losses(model, group.runner.head, batch.to(bank.device))
                at = (batch.slots.supervised, batch.example[batch.supervised])
                totals.index_put_(at, losses_s.double().cpu(), accumulate=True)
    finally:
        model.train()
    return {name: (totals[slot], counts) for name, slot in zip(names, slots, strict=True)}
