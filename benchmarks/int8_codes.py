"""Kernels that make codes for int8 products, beside their definitions as the compiler has them.

Part of `h200_kernels.py`: of an 8B model's sizes, forms replayed in turn. A row says of the
kernel's codes which share differs from the definition's, and by how much at most: 1 where a number
lies in the middle between two.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.graph_times import in_turns
from tunefork.kernels.int8_gradients import gradient_codes, gradient_codes_reference
from tunefork.kernels.int8_rows import (
    nearest,
    round_apart,
    round_apart_reference,
    round_rows,
    round_rows_reference,
    rounded,
    turned,
)
from tunefork.kernels.layout import Layout
from tunefork.kernels.lora_gradients import lora_gradients
from tunefork.kernels.nf4_int8 import Nf4Rows, nf4_scales
from tunefork.kernels.quantized import dequantize_nf4_tensors, nf4_tensors, quantize_nf4

TOKENS, SCALE, RANK = 16_384, 0.5, 16
APART = ((4096, 96), (14_336, 64))
"""Features of x, and columns of what is read of it."""
ROWS = ((4096, 1024, 1024), (4096,))
"""Features out of the layers of a group."""
PAIR = (14_336, 14_336)
"""gate and up, whose gradients' maxima SwiGLU's kernel leaves."""
WEIGHTS = ((28_672, 4096), (4096, 14_336))
_REPEATS = 3


def measured(device: str = "cuda") -> Iterator[dict[str, Any]]:
    """A row for each kernel and size."""
    torch.manual_seed(0)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

    directions = Layout("int8", "int8", (16,), (0,), 1.0).apart
    for features, narrow in APART:
        given: tuple[Any, ...] = draw(TOKENS, features), draw(TOKENS, narrow)
        given += (draw(directions, features) / directions,)
        yield _row("round_apart", [features, narrow], round_apart, round_apart_reference, *given)
    for sizes in ROWS:
        dys = [draw(TOKENS, size) for size in sizes]
        given = dys, torch.rand(1, sum(sizes), device=device)
        yield _row("round_rows", sizes, round_rows, round_rows_reference, *given)
    dys, fold_1o = [draw(TOKENS, size) for size in PAIR], torch.rand(1, sum(PAIR), device=device)
    most_s1 = (torch.cat(dys, dim=1).float() * fold_1o).abs().amax(1, keepdim=True)
    u_sr, b = draw(TOKENS, RANK * len(PAIR)), [draw(size, RANK) for size in PAIR]
    yield _row(
        *("gradient_codes", PAIR, gradient_codes, gradient_codes_reference),
        *(dys, u_sr, b, SCALE, fold_1o, most_s1),
        others={
            "two_readings": lambda: (
                round_rows(dys, fold_1o),
                lora_gradients(dys, u_sr, b, SCALE),
            )
        },
    )
    for size, features in WEIGHTS:
        weight_od = draw(size, features)
        tensors = nf4_tensors(*quantize_nf4(weight_od))
        rows = Nf4Rows(tensors, nf4_scales(tensors, [size], features), [size], features)
        yield _row("of_nf4", [size, features], Nf4Rows.codes, _of_nf4, rows)
        yield _row("of_nf4_turned", [size, features], Nf4Rows.codes_turned, _of_nf4_turned, rows)
        codes_od, _ = rounded(weight_od)
        yield _row("turned", [size, features], turned, _turned, codes_od)


def _of_nf4(rows: Nf4Rows) -> Tensor:
    weight_od = dequantize_nf4_tensors(rows.tensors, rows.sizes, rows.features_in, torch.bfloat16)
    return nearest(weight_od, rows.scale_1o.t())


def _of_nf4_turned(rows: Nf4Rows) -> Tensor:
    return _of_nf4(rows).t().contiguous()


def _turned(codes_od: Tensor) -> Tensor:
    return codes_od.t().contiguous()


def _row(
    name: str,
    sizes: Any,
    kernel: Callable[..., Any],
    definition: Callable[..., Any],
    *given: Any,
    others: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, Any]:
    found, wanted = (_codes(form(*given)).short() for form in (kernel, definition))
    off = (found - wanted).abs()
    compiled = torch.compile(definition, dynamic=False)
    forms: dict[str, Callable[[], Any]] = {
        "kernel": lambda: kernel(*given),
        "definition_compiled": lambda: compiled(*given),
        **(others or {}),
    }
    return {
        "case": f"int8_{name}",
        "sizes": list(sizes),
        "ms": in_turns({form: [call] * _REPEATS for form, call in forms.items()}),
        "differing": float((off > 0).float().mean()),
        "furthest": int(off.max()),
    }


def _codes(made: Any) -> Tensor:
    """Of what a kernel makes the codes, which come first."""
    found: Tensor = made if isinstance(made, Tensor) else made[0]
    return found
