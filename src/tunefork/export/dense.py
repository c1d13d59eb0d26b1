"""Deltas and 4-bit weights become plain linear layers, one layer at a time.

A merged weight is W + scale * B A, computed in fp32 and rounded once, to nearest, to the dtype of
the base. That rounding is the only inexact step: half a unit in the last place, in bf16 at most
1/512 of each weight. Memory stays that of the model and one layer's fp32 copy.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tunefork.model.build import replace
from tunefork.model.dora import Delta
from tunefork.model.linear import Nf4Linear
from tunefork.model.tokens import TokenEmbedding, TokenHead


@torch.no_grad()
def merge_deltas(model: Any, dtype: torch.dtype) -> None:
    """Make `model` plain, in `dtype` and in place: no deltas, trained rows or 4-bit weights.

    DoRA's lengths are multiplied in, too.
    """
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Delta):
            replace(model, path, _linear(layer.merged_weight().to(dtype), layer.base.bias))
    expand(model)
    _put_rows(model)
    model.to(dtype)  # what was trained whole is in fp32
    if model.config.tie_word_embeddings and not _is_tied(model):
        model.config.tie_word_embeddings = False  # else the reader would drop the trained head


@torch.no_grad()
def expand(model: Any) -> None:
    """Dequantise every NF4 layer that is left, under a delta or without one, in place."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Delta) and isinstance(layer.base, Nf4Linear):
            layer.base = _linear(layer.materialize(), layer.base.bias)
        elif isinstance(layer, Nf4Linear) and not path.endswith(".base"):
            replace(model, path, _linear(layer.materialize(), layer.bias))


def _put_rows(model: Any) -> None:
    """Write trained rows into embedding and head; a table that both share stays one if it can."""
    layers = [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, TokenEmbedding | TokenHead)
    ]
    tables = [layer.weight.detach().clone() for _, layer in layers]  # before any is changed
    for (path, layer), table_vd in zip(layers, tables, strict=True):
        if all(torch.equal(table_vd, other) for other in tables):
            layer.base.weight.data = table_vd  # of the parameter that a tied head shares
        else:
            layer.base.weight = nn.Parameter(table_vd, requires_grad=False)
        replace(model, path, layer.base)


def _is_tied(model: Any) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is None or head.weight is embeddings.weight


def _linear(weight_od: Tensor, bias_o: nn.Parameter | None) -> nn.Linear:
    num_out, num_in = weight_od.shape
    linear = nn.Linear(num_in, num_out, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_od, requires_grad=False)
    if bias_o is not None:
        linear.bias = nn.Parameter(bias_o.detach().to(weight_od.dtype), requires_grad=False)
    return linear
