"""Held-out loss, example by example."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.data.pack import pack
from tunefork.evaluate.statistics import Columns
from tunefork.model.head import find_head
from tunefork.train.loss import token_losses


@torch.inference_mode()
def loss_columns(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    *,
    max_tokens: int,
    packing: bool,
    pad_id: int,
) -> Columns:
    """Columns `loss_sum` (nats) and `tokens` (supervised ones) of each example, in eval mode."""
    was_training = model.training
    model.eval()
    head = find_head(model)
    loss_sum = np.zeros(len(examples))
    tokens = np.zeros(len(examples), dtype=np.int64)
    for batch in pack(examples, max_tokens=max_tokens, packing=packing, pad_id=pad_id):
        of = batch.example[batch.supervised].numpy()
        losses = token_losses(model, head, batch.to(model.device)).cpu().double().numpy()
        np.add.at(loss_sum, of, losses)
        np.add.at(tokens, of, 1)
    model.train(was_training)
    return {"loss_sum": loss_sum, "tokens": tokens}
