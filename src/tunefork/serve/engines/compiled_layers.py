"""Decoder layers of captured passes, compiled: a layer as written is some forty kernels, most of
them norms and rotations of a few kilobytes, which a GPU cannot do in less than two microseconds.

One compiled form serves all layers, which differ in their weights alone, and all numbers of rows:
that dimension is marked, so that everything else stays a number that the compiler knows. Whether a
decoding pass has adapters is another form, and so are many rows, whose heads are grouped
(`flash.py`). Passes with prompts have two forms, of few tokens (`kernels/bank_mixed.py`) and of
more, with and without adapters.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.model.layers import decoder_layers
from tunefork.serve.engines.reads import Reads

_MOST_FORMS = 64
"""With or without adapters, by attention's limits of length, and of prompts, for each kind of
layer: 17 for a million tokens."""


class CompiledLayers:
    """The layers of `model`, compiled while `is_on`."""

    def __init__(
        self, model: PreTrainedModel, compiler: Callable[..., Any] = torch.compile
    ) -> None:
        self.is_on = False
        self._layers = decoder_layers(model)
        self._compiled = compiler(_as_written, fullgraph=True)
        for layer in self._layers:
            layer.forward = partial(self._run, layer)

    def remove(self) -> None:
        """Layers run as written from now on."""
        for layer in self._layers:
            del layer.forward

    def mark(self, tensor: Tensor) -> None:
        """Its rows are of any number: (N, ...), or (1, N, ...) where transformers keeps a batch."""
        torch._dynamo.maybe_mark_dynamic(tensor, int(tensor.ndim > 1 and tensor.shape[0] == 1))

    def _run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.is_on:
            return _as_written(layer, *args, **kwargs)
        for tensor in _tensors((args, kwargs)):
            self.mark(tensor)
        with torch._dynamo.config.patch(recompile_limit=_MOST_FORMS):
            return self._compiled(layer, *args, **kwargs)


def _as_written(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _tensors(told: Any) -> Iterator[Tensor]:
    match told:
        case Tensor():
            yield told
        case Reads():
            yield from (told.write_n, told.starts_q, told.starts_k, told.used_r)
            yield from told.grouped.values()
            if told.decoding is not None:
                yield from (told.decoding.used_m, told.decoding.starts_rest)
        case tuple() | list():
            for one in told:
                yield from _tensors(one)
        case dict():
            yield from _tensors(list(told.values()))
