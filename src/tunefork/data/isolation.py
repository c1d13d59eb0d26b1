"""Whether a model keeps the examples of one row apart. Most do; it is measured, not believed.

transformers derives the mask of packed rows from `position_ids` for most architectures, but OPT,
BLOOM and MPT (5.24) and also Falcon (5.17) never hand their positions on, and recurrent layers
have no mask at all: there every example reads those before it, silently.
"""

import torch
from torch import nn

from tunefork.errors import ModelError


def check_packing(model: nn.Module) -> None:
    """Raise ModelError for a model that must not be given packed rows."""
    if not keeps_apart(model):
        raise ModelError(
            f"train.packing: {type(model).__name__} lets examples of one row read each other; set "
            "train.packing: false"
        )


@torch.no_grad()
def keeps_apart(model: nn.Module) -> bool:
    """Whether `model`, a transformers causal LM, may be given packed rows.

    Two rows of two examples each differ in the first example only; the logits of the second must
    not move. Masked scores weigh exactly zero, so what movement there is comes from a leak; the
    tolerance, 1/1000 of the largest logit, is for kernels that are not deterministic.
    """
    device = next(model.parameters()).device
    input_ids = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 6, 7, 8]], device=device)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device).expand(2, -1)
    was_training = model.training
    model.eval()
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    model.train(was_training)
    second = logits[:, 3:].float()
    leak = (second[0] - second[1]).abs().max() > 1e-3 * second.abs().max()
    return not bool(leak)  # NaN is no leak: a broken model is named where its loss is measured
