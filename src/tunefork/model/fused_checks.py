"""What frozen layers must be for `fused.py`: finite, and of sizes that 8-bit products take."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tunefork.errors import ModelError
from tunefork.kernels.int8_product import MOST_SUMMED, STEP
from tunefork.kernels.layout import Products


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


def check_sizes(layers: Mapping[str, Any], products: Products) -> None:
    """Raise ModelError for a group of layers, by their paths, of sizes that `products`, int8 or
    fp8, do not take."""
    is_int8 = products == "int8"
    asked, remedy = (
        ("train.precision: int8", "bf16") if is_int8 else ("embedded.base_storage: fp8", "dense")
    )
    for path, layer in layers.items():
        if layer.in_features % STEP or layer.out_features % STEP:
            raise ModelError(
                f"{asked} needs layers whose sizes are multiples of {STEP}, and {path} is "
                f"{layer.in_features} -> {layer.out_features}; set {remedy}"
            )
    most = max(sum(layer.out_features for layer in layers.values()), layer.in_features)
    if is_int8 and most > MOST_SUMMED:
        raise ModelError(
            f"{asked} sums over {MOST_SUMMED:,} numbers at most, and {path} and the layers with "
            f"its input have {most:,}; set {remedy}"
        )
