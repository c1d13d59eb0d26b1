"""How much of a small delta is left in a layer's bf16 result: is it rounded once, or twice?

    python -m benchmarks.rounded_once          a GPU, or a CPU

A LoRA's delta begins small: far below a bf16 rounding of what it is added to. Rounded once, the sum
of base product and delta keeps it on average, as the exact sum lies anywhere between two bf16
numbers. Where the base product is rounded first, it lies on one of them, and a delta of less than
half a step is lost. This measures the share that is kept, <y - base, delta> / <delta, delta> with
the exact base product, for deltas of several sizes and the ways that the engine and its peers have:

    inside    the delta is inside the product (`kernels/bf16_product.py`)
    onto      the product is added in place onto the delta, by cuBLAS on a GPU
    onto, no reduced precision      the same, where cuBLAS may not sum in bf16
    widened   [x | u] [W | B]^T, one product (where y is much wider than x)
    plain     the product, then the delta added to it (PEFT, Unsloth)
    int8      `kernels/int8.py`'s product, delta inside

Writes results/rounded_once.json on a GPU; on a CPU it only prints.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.training_runs import pick, versions
from tunefork.kernels.bf16_product import bf16_product
from tunefork.kernels.int8_product import int8_product
from tunefork.kernels.int8_rows import rounded

_SHAPES = ((8192, 576, 576), (8192, 1536, 576), (8192, 576, 960), (16_384, 4096, 6144))
"""Tokens, features in and out: SmolLM2-135M's o, down, and q, k, v; q, k, v of an 8B model."""
_SMALL = 1024
"""Tokens on a CPU."""
_RANK = 16
_SIZES = (2.0**-6, 2.0**-8, 2.0**-10, 2.0**-12)
"""Of the delta, over the base product's; bf16 rounds by 2**-9 at most."""


def kept(shape: tuple[int, int, int], size: float, device: torch.device) -> dict[str, float]:
    """The share of the delta that each way keeps."""
    torch.manual_seed(0)
    tokens, features_in, features_out = shape

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device)

    x = normal(tokens, features_in).bfloat16()
    weight = (normal(features_out, features_in) / features_in**0.5).bfloat16()
    u, b = normal(tokens, _RANK).bfloat16(), normal(features_out, _RANK) * size / _RANK**0.5
    b = b.bfloat16()
    delta, base = u.double() @ b.double().t(), x.double() @ weight.double().t()
    codes, scale = rounded(x)
    weight_codes, weight_scale = rounded(weight)

    def share(y: Tensor, of: Tensor = base) -> float:
        return float(((y.double() - of) * delta).sum() / delta.square().sum())

    def onto() -> Tensor:
        return (u @ b.t()).addmm_(x, weight.t())

    def exactly_onto() -> Tensor:
        before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        try:
            return onto()
        finally:
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before

    ways: dict[str, Callable[[], Tensor]] = {
        "inside": lambda: bf16_product([x], weight, u, b, is_turned=False),
        "onto": onto,
        "onto, no reduced precision": exactly_onto,
        "widened": lambda: torch.cat([x, u], dim=1) @ torch.cat([weight, b], dim=1).t(),
        "plain": lambda: x @ weight.t() + u @ b.t(),
    }
    found = {name: share(way()) for name, way in ways.items()}
    of_codes = (codes.double() * scale) @ (weight_codes.double() * weight_scale).t()
    product = int8_product(codes, weight_codes, scale, weight_scale.t(), u, b)
    return found | {"int8": share(product, of_codes)}


def main() -> None:
    """Measure, print, write."""
    device, rows = pick(), list[dict[str, Any]]()
    for tokens, *features in _SHAPES:
        shape = (tokens if device.type == "cuda" else _SMALL, *features)
        for size in _SIZES:
            rows.append({"case": shape, "delta_over_base": size, "kept": kept(shape, size, device)})  # type: ignore[arg-type]
            shares = {name: round(share, 3) for name, share in rows[-1]["kept"].items()}
            print(shape, f"{size:.6f}", shares, flush=True)
    if device.type == "cuda":
        results.write(
            "rounded_once",
            rows,
            device=torch.cuda.get_device_name(),
            command="python -m benchmarks.rounded_once",
            versions=versions(),
        )


if __name__ == "__main__":
    main()
