"""The loss of a micro-batch: cross-entropy summed over its supervised tokens.

It is a sum, never a mean: the loop divides by the supervised tokens of the whole optimiser step,
so that accumulating k micro-batches equals one big batch (the mean of micro-batch means does not;
transformers#37766, trl#2175).

Only supervised positions go through the output head, in one of two ways (`model.head` says which):
the decoder's hidden states straight into the fused kernel, or, for an architecture that does
something to its logits afterwards (soft-capping, scaling), the model's own head, PyTorch's loss.

A training pass tells a model that takes them the segments in place of a mask; evaluation keeps
transformers' own way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tunefork.data.pack import IGNORED, MicroBatch
from tunefork.kernels.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_each,
    linear_cross_entropy_sum,
)
from tunefork.model.head import Head


def loss_sum(model: PreTrainedModel, head: Head, batch: MicroBatch) -> Tensor:
    """Summed loss of the batch's supervised tokens: scalar, fp32, nats, with its gradient.

    Places whose label is -100 add nothing to either.
    """
    inputs = (batch.input_ids, batch.position_ids)
    segments = batch.segments if head.takes_segments else None
    if head.is_plain:
        hidden_sd = _supervised(head.hidden(model, *inputs, segments=segments), batch)
        return linear_cross_entropy_sum(hidden_sd, head.weight, batch.labels)
    logits_sv = head.logits(model, *inputs, batch.supervised, segments=segments)
    return F.cross_entropy(logits_sv.float(), batch.labels, ignore_index=IGNORED, reduction="sum")


def slot_losses(model: PreTrainedModel, head: Head, batch: MicroBatch, counts_g: Tensor) -> Tensor:
    """Each adapter's summed loss over its own count: (G,), fp32, nats, with a gradient.

    `batch.slots` says which tokens are whose, `counts_g` how many supervised tokens each adapter's
    optimiser step has. No sum, forwards or backwards, reaches over two adapters.
    """
    assert batch.slots is not None
    losses_s = _each(model, head, batch)
    shares_s = losses_s / counts_g[batch.slots.supervised]
    return torch.zeros_like(counts_g).index_add(0, batch.slots.supervised, shares_s)


def _each(model: PreTrainedModel, head: Head, batch: MicroBatch) -> Tensor:
    inputs = (batch.input_ids, batch.position_ids)
    segments = batch.segments if head.takes_segments else None
    if head.is_plain:
        hidden_sd = _supervised(head.hidden(model, *inputs, segments=segments), batch)
        return linear_cross_entropy_each(hidden_sd, head.weight, batch.labels)
    logits_sv = head.logits(model, *inputs, batch.supervised, segments=segments)
    return F.cross_entropy(logits_sv.float(), batch.labels, ignore_index=IGNORED, reduction="none")


def _supervised(hidden_rtd: Tensor, batch: MicroBatch) -> Tensor:
    """(S, D), those of the supervised tokens."""
    row_s, column_s = batch.supervised
    # By one number: by two it takes a GPU eight times as long.
    return hidden_rtd.flatten(0, 1)[row_s * hidden_rtd.shape[1] + column_s]


@torch.no_grad()
def token_losses(model: PreTrainedModel, head: Head, batch: MicroBatch) -> Tensor:
    """Loss of each supervised token in row-major order: (S,), fp32, nats, without a gradient."""
    inputs = (batch.input_ids, batch.position_ids)
    if head.is_plain:
        hidden_sd = _supervised(head.hidden(model, *inputs), batch)
        return linear_cross_entropy(hidden_sd, head.weight, batch.labels)
    logits_sv = head.logits(model, *inputs, batch.supervised)
    return F.cross_entropy(logits_sv.float(), batch.labels, reduction="none")
