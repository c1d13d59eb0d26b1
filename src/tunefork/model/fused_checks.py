"""What frozen layers must be for `fused.py`: finite, and of sizes that FP8 products take."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tunefork.errors import ModelError


def check_finite(weights: Sequence[Tensor], paths: Sequence[str]) -> None:
    """Raise ModelError where one of a group's `weights`, or of their scales, is not finite: unlike
    a parameter's they are out of reach of `train.guard.check_weights` from here on."""
    for kept in weights:
        is_wide = kept.dtype in (torch.bfloat16, torch.float32) and not kept.is_meta
        if is_wide and not bool(kept.isfinite().all()):
            raise ModelError(
                f"model.id: a weight of {', '.join(paths)} is not finite; the file is damaged, or "
                "was saved after training diverged. Give another model or revision"
            )


def check_sizes(layers: Mapping[str, Any]) -> None:
    """Raise ModelError for a layer, by its path, of a size that FP8 products do not take."""
    for path, layer in layers.items():
        if layer.in_features % 16 or layer.out_features % 16:
            raise ModelError(
                f"train.precision: fp8 needs layers whose sizes are multiples of 16, and {path} is "
                f"{layer.in_features} -> {layer.out_features}; set bf16"
            )
