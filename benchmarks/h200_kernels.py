"""Kernels of our own beside what they replaced, alone on a GPU.

    python -m benchmarks.h200_kernels

lora_gradients   du and dB from one reading of dy, beside two cuBLAS products; dy of 16,384 tokens.
                 Every call of a CUDA graph reads another dy, a GiB of them: none is in the cache.
gated            an MLP's h = silu(gate) * up and u = h A^T; backward the gradients of gate, up and
                 A; beside the compiler's SwiGLU and a cuBLAS product that reads h once more
                 (backward an h that was kept); with the gradients' rows' largest magnitudes
                 too; replayed in turn
int8_*           codes of activations, gradients and weights for int8 products (`int8_codes.py`)
adamw_bf16       the update of all weights of a 1.7B and an 8B model: from the call to the GPU's
                 last kernel, and until the call returns
adamw_fp32_moments  the same update of bf16 weights with fp32 moments, beside PyTorch's fused AdamW
                 on fp32 copies; "shadows kept": of fp32 shadows

Medians; errors are against float64, in units of the largest value. Writes
results/h200_kernels.json.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import int8_codes
from benchmarks.graph_times import graph_ms, in_turns
from benchmarks.results import write

TOKENS, SCALE = 16_384, 0.5
PRODUCTS = ((1024, 16), (4096, 16), (14_336, 16), (4096, 32), (4096, 64))
"""Features out and rank."""
GATED = ((14_336, 16), (14_336, 32), (14_336, 64), (6144, 16))
"""Features of an MLP, and rank."""
_STEPS = 12


def main() -> None:
    """Measure, print, write."""
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    rows = [_print(gradients(features, rank)) for features, rank in PRODUCTS]
    rows += [_print(gated(features, rank)) for features, rank in GATED]
    rows += [_print(row) for row in int8_codes.measured()]
    rows += [_print(row) for name, shapes in SHAPES.items() for row in updates(name, shapes)]
    print(write("h200_kernels", rows, device=torch.cuda.get_device_name()))


def gradients(features: int, rank: int) -> dict[str, Any]:
    """One layer's du and dB."""
    from tunefork.kernels.lora_gradients import lora_gradients_reference
    from tunefork.kernels.lora_gradients_triton import launch

    torch.manual_seed(0)
    count = max(3, 2**30 // (TOKENS * features * 2))
    dys = [_draw(TOKENS, features) for _ in range(count)]
    u, b = _draw(TOKENS, rank), _draw(features, rank)
    exact_du, [exact_db] = lora_gradients_reference(
        [dys[0].double()], u.double(), [b.double()], SCALE
    )
    found = launch([dys[0]], u, [b], SCALE)
    wrong = max(map(_error, found, [exact_du, exact_db]))
    ours = graph_ms([lambda dy=dy: launch([dy], u, [b], SCALE) for dy in dys])
    theirs = graph_ms([lambda dy=dy: (dy @ b, dy.t() @ u) for dy in dys])
    return {
        "case": "lora_gradients",
        "features": features,
        "rank": rank,
        "one_reading_ms": ours,
        "two_products_ms": theirs,
        "error": wrong,
    }


def gated(features: int, rank: int) -> dict[str, Any]:
    """Forward and backward, in turn."""
    from tunefork.kernels import gated as definition
    from tunefork.kernels.gated_triton import backward, forward

    torch.manual_seed(0)
    gate, up, dh = (_draw(TOKENS, features) for _ in range(3))
    du, a = _draw(TOKENS, rank), _draw(rank, features)
    fold = torch.rand(1, 2 * features, device="cuda")
    h, _ = forward(gate, up, a)

    @torch.compile(dynamic=False)
    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate) * up

    @torch.compile(dynamic=False)
    def swiglu_backward(gate: Tensor, up: Tensor, dh: Tensor) -> tuple[Tensor, ...]:
        gate, up, dh = gate.float(), up.float(), dh.float()
        share = torch.sigmoid(gate)
        dgate = dh * up * share * (1 + gate * (1 - share))
        return dgate.bfloat16(), (dh * gate * share).bfloat16()

    forms: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(gate, up, a),
        "forward_swiglu_and_product": lambda: swiglu(gate, up) @ a.t(),
        "backward": lambda: backward(gate, up, dh, du),
        "backward_and_maxima": lambda: backward(gate, up, dh, du, fold_1o=fold),
        "backward_swiglu_and_product": lambda: (swiglu_backward(gate, up, dh), du.t() @ h),
    }
    few = slice(0, 2048)  # float64 of all would take 10 GB
    exact: tuple[Tensor, ...] = definition.gated_down_reference(
        gate[few].double(), up[few].double(), a.double()
    )
    ours: tuple[Tensor, ...] = forward(gate[few], up[few], a)
    operands = gate[few], up[few], dh[few].clone(), du[few]
    exact += definition.gated_gradients_reference(*(x.double() for x in operands))
    dgate, da = backward(*operands)
    ours += dgate, operands[2], da  # dup is written over dh
    # Normal again, or it shrinks with each call.
    ms = in_turns({name: [form] * 3 for name, form in forms.items()}, before=dh.normal_)
    return {
        "case": "gated",
        "features": features,
        "rank": rank,
        "ms": ms,
        "error": max(map(_error, ours, exact)),
    }


def _draw(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)


def _error(ours: Tensor, exact: Tensor) -> float:
    error = float((ours.double() - exact).abs().max() / exact.abs().max())
    if not math.isfinite(error):
        raise ValueError("a result that is not finite")
    return error


def _qwen3_1_7b() -> list[tuple[int, ...]]:
    attention = [(2048, 2048)] * 2 + [(1024, 2048)] * 2 + [(128,)] * 2
    layer = [*attention, (6144, 2048), (6144, 2048), (2048, 6144), (2048,), (2048,)]
    return [(151_936, 2048), *layer * 28, (2048,)]


def _llama_8b() -> list[tuple[int, ...]]:
    attention = [(4096, 4096)] * 2 + [(1024, 4096)] * 2
    layer = [*attention, (14_336, 4096), (14_336, 4096), (4096, 14_336), (4096,), (4096,)]
    return [(128_256, 4096), *layer * 32, (4096,), (128_256, 4096)]


SHAPES = {"1.7b": _qwen3_1_7b(), "8b": _llama_8b()}


def updates(name: str, shapes: Sequence[tuple[int, ...]]) -> Iterator[dict[str, Any]]:
    """Each optimiser over all weights of a model."""
    from tunefork.train import optim
    from tunefork.train.adamw_bf16 import Bf16AdamW

    weights = [
        torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
        for shape in shapes
    ]
    gradients = [torch.randn_like(weight) for weight in weights]
    settings = {"betas": (0.9, 0.999), "weight_decay": 0.1}

    def row(case: str, optimizer: Any) -> dict[str, Any]:
        named = {"case": case, "model": name, "weights": len(weights)}
        return named | update(weights, gradients, optimizer)

    yield row("adamw_bf16", Bf16AdamW(weights, **settings))  # type: ignore[arg-type]
    allows = optim._allows_at_once
    for keep_shadows in (False, True):
        case = "adamw_fp32_moments" + (", shadows kept" if keep_shadows else "")
        options = settings | {"keep_shadows": keep_shadows, "eight_bit": False}
        yield row(case, optim.ShadowAdamW(weights, **options))  # type: ignore[arg-type]
        optim._allows_at_once = lambda parameter: False
        optimizer = optim.ShadowAdamW(weights, **options)  # type: ignore[arg-type]
        optim._allows_at_once = allows
        yield row(f"{case}: fp32 copies, fused", optimizer)
        del optimizer


def update(
    weights: Sequence[torch.nn.Parameter], gradients: Sequence[Tensor], optimizer: Any
) -> dict[str, float]:
    """Milliseconds of a step, and GiB that it takes beside what is there."""
    returned, ended = [], []
    for number in range(3 + _STEPS):
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        torch.cuda.synchronize()
        if number == 3:  # by now every state is there
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        began = time.perf_counter()
        optimizer.step(1e-4, 0.5)
        returned.append(1000 * (time.perf_counter() - began))
        torch.cuda.synchronize()
        ended.append(1000 * (time.perf_counter() - began))
    return {
        "host_ms": round(statistics.median(returned[3:]), 2),
        "whole_ms": round(statistics.median(ended[3:]), 2),
        "taken_gib": round((torch.cuda.max_memory_allocated() - held) / 2**30, 3),
    }


def _print(row: dict[str, Any]) -> dict[str, Any]:
    print(row, flush=True)
    torch.cuda.empty_cache()
    return row


if __name__ == "__main__":
    main()
