"""Whether a model may be told segments in place of a mask. Measured, never believed.

It takes two passes over two short rows. In the first each attention call gets both, transformers'
own dense mask and the segments: they must say the same, token by token and window by window, and
the call must ask for nothing else (`packed_attention.refusal`). In the second the segments stand
alone, and the hidden states must be those of the mask: what an architecture does with a mask
outside its attention shows there. There must be one call a layer, and no token may reach another
segment by other ways (`data.isolation`). A model that fails keeps the mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from tunefork.data.isolation import keeps_apart
from tunefork.data.pack import Segments
from tunefork.model import attention
from tunefork.model.attention_reference import sees
from tunefork.model.packed_attention import in_place_of_mask, refusal

_NAME = "tunefork_probe"
_LENGTHS = ((7, 5, 4), (9, 7))
"""Segments of the two rows."""
_AGREEMENT = {torch.float32: 1e-3}
_LOW_PRECISION = 0.2
"""Most by which hidden states may differ, in the mean, relative. Two kernels' rounding in bf16 is
0.021 (SmolLM2-135M, 30 layers, SDPA against products), and int8 layers would make it larger; to
see a row's other segments is 0.33. This is for the gross; that attention is exact, the first pass
says.
"""

_LARGE_HEADS = ((8, 0), (9, 0), (10, 0))
"""CUDA capabilities whose shared memory holds the backward pass of more than 192 features."""


@torch.no_grad()
def takes_segments(model: PreTrainedModel) -> bool:
    """Whether `model`'s training passes may use `packed_attention`."""
    if model.config._attn_implementation != attention.NAME:
        return False
    device = model.device
    lengths = [length for row in _LENGTHS for length in row]
    segments = Segments.of(lengths, rows=len(_LENGTHS)).to(device)
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    position_ids = position_ids.view(len(_LENGTHS), -1).to(device)
    input_ids = torch.arange(position_ids.numel(), device=device).view_as(position_ids)
    was_training = model.training

    def hidden(**mask: Any) -> Tensor:
        found: Tensor = model.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **mask
        ).last_hidden_state
        return found

    told = in_place_of_mask(segments, position_ids.shape[1])
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=devices):
            with _watched(model, segments) as calls:
                model.train()  # shows what dropout attention has
                hidden(**{name: value for name, value in told.items() if name != "attention_mask"})
            model.eval()
            by_mask, by_segments = hidden(), hidden(**told)
            is_apart = keeps_apart(model)
    except torch.OutOfMemoryError:  # a RuntimeError, but no word on the model
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(was_training)
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if not (is_apart and all(calls) and len(calls) == num_layers):
        return False
    error = (by_mask.float() - by_segments.float()).abs().mean()
    most = _AGREEMENT.get(by_mask.dtype, _LOW_PRECISION)
    return bool(error < most * by_mask.float().abs().mean())  # NaN is no agreement


@contextmanager
def _watched(model: PreTrainedModel, segments: Segments) -> Iterator[list[bool]]:
    """While entered, says of each attention call whether its mask and its segments are one."""
    calls: list[bool] = []
    masks: list[tuple[Tensor | None, int | None]] = []

    def make(*shape: Any, local_size: int | None = None, **how: Any) -> Tensor | None:
        made: Tensor | None = sdpa_mask(*shape, local_size=local_size, **how)
        masks.append((made, local_size))
        return made

    def watch(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        dropout = kwargs.pop("dropout", 0.0)
        window = kwargs.get("sliding_window")
        made = [size for own, size in masks if own is mask]
        calls.append(
            mask is not None
            and made == [window]
            and kwargs.get("cu_seq_lens_q") is segments.starts
            and {"max_length_q", "whole_rows"} <= kwargs.keys()
            and _has_gradient(q)
            and refusal(module, q, k, v, dropout=dropout, **kwargs) is None
            and torch.equal(mask[:, 0], _by_row(segments, q.shape[0], q.shape[2], window))
        )
        del kwargs["cu_seq_lens_q"]
        return attention.attention(module, q, k, v, mask, **kwargs)

    AttentionInterface.register(_NAME, watch)
    AttentionMaskInterface.register(_NAME, make)
    model.config._attn_implementation = _NAME
    try:
        yield calls
    finally:
        model.config._attn_implementation = attention.NAME


def _has_gradient(q: Tensor) -> bool:
    """Whether flash attention's backward pass takes heads of this size on this GPU."""
    if q.shape[-1] <= 192 or not q.is_cuda:
        return True
    return torch.cuda.get_device_capability(q.device) in _LARGE_HEADS


def _by_row(segments: Segments, rows: int, length: int, window: int | None) -> Tensor:
    """The mask of each row: (B, T, T)."""
    whole = sees(segments.starts, rows * length, window).view(rows, length, rows, length)
    return torch.stack([whole[row, :, row] for row in range(rows)])
