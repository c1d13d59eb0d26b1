"""A pass of many lengths is filled up to a size that is captured already, rather than launched.

Steps of 16 examples come in some hundred sizes (`data/bucket.py`), and a run keeps a few graphs.
Where the GPU waits for the host anyway, half as many tokens more cost nothing, and their replay
spares it all launches (`benchmarks/replayed_passes.py` counts them).
"""

from collections.abc import Iterable

from transformers import PreTrainedModel

from tunefork.data.bucket import Size, holds
from tunefork.data.pack import MicroBatch
from tunefork.model.fused import FusedLinear
from tunefork.model.layers import decoder_layers

_SHARE = 1.5
"""Up to so many times the tokens, and the supervised ones, a pass is filled up."""
_LAYER_WORK = 7.5e11
"""Tokens times parameters, a layer, up to which launching a pass of LoRA takes longer than a Hopper
GPU computes: 5 ms a layer (measured: 159 ms for 32 layers), in which it does 3e12 operations, 4 for
each token and parameter."""


def most_waiting_tokens(model: PreTrainedModel) -> int:
    """Up to how many tokens the GPU waits for the host, where a pass of `model` is launched."""
    fused = (m for m in model.modules() if isinstance(m, FusedLinear))
    num_weights = sum(m.in_features * m.out_features for m in fused)
    num_weights += sum(p.numel() for p in model.parameters())
    return int(_LAYER_WORK * len(decoder_layers(model)) / num_weights)


def nearest(size: Size, batch: MicroBatch, captured: Iterable[Size], most_tokens: int) -> Size:
    """What to fill `batch` up to, whose own size is `size` and not captured: the least captured one
    that holds it and is near, if any. Beyond `most_tokens`, and where rows are whole, its own."""
    if size.is_uniform or size.length > most_tokens:
        return size
    near = [
        found
        for found in captured
        if not found.is_uniform
        and found.length <= _SHARE * size.length
        and found.supervised <= _SHARE * size.supervised
        and holds(found, batch)
    ]
    return min(near, key=_cost, default=size)


def _cost(size: Size) -> tuple[int, int]:
    return size.length, size.supervised
