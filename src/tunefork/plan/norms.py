"""Which inputs of a decoder layer's products are norms' outputs: quickly made again, so not kept.

A Llama layer has two, that of attention and that of the MLP; one whose norms come after its blocks
(OLMo 2) has none, and one whose blocks run side by side (Phi-2) one.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from tunefork.data.pack import Segments
from tunefork.kernels.compiled import standing_for_gpu
from tunefork.model.layers import decoder_layers
from tunefork.model.packed_attention import in_place_of_mask
from tunefork.plan.attention import NAME, Setting, install
from tunefork.plan.shape import PlanError, at_depth, depths, on_meta, traceable
from tunefork.plan.trace import Trace

_TOKENS = 8


def norm_inputs(config: Any) -> int:
    """Of the first layer of `config`'s model, run on the meta device.

    A module whose parameters are all vectors is taken for a norm. 0 for layers that do not run
    without a mask: these are not compiled, and keep what they are written to.
    """
    normed: list[Tensor] = []
    read: list[Tensor] = []
    install(Setting("cuda", is_masked=False), Trace())
    model = on_meta(at_depth(config, depths(config)[0]), dtype=torch.bfloat16, attention=NAME)
    for module in decoder_layers(model)[0].modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        elif own and all(p.dim() == 1 for p in own):
            module.register_forward_hook(lambda _m, _given, output: normed.append(output))
    ids = torch.empty(1, _TOKENS, dtype=torch.int64, device="meta")
    starts = torch.empty(2, dtype=torch.int32, device="meta")
    told = in_place_of_mask(Segments(starts, _TOKENS, is_uniform=False), _TOKENS)
    try:
        with traceable(config), torch.no_grad(), _unfused():
            model.base_model(input_ids=ids, position_ids=ids, **told, use_cache=False)
    except PlanError:
        return 0
    return sum(any(output is given for given in read) for output in normed)


def _unfused() -> AbstractContextManager[None]:
    return standing_for_gpu(lambda function, args, kwargs: function(*args, **kwargs))
