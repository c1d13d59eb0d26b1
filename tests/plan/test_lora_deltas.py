"""The operator that writes LoRA's deltas, as a plan counts it: a kernel a layer that writes all."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tunefork.kernels.lora_deltas import lora_deltas
from tunefork.plan.graph import TOKENS, program_of
from tunefork.plan.trace import Trace

SIZES, RANKS = (64, 32), (8, 4)
PAIRS = list(zip(SIZES, RANKS, strict=True))


def _operands(tokens: int) -> list[torch.Tensor]:
    shapes = [(tokens, sum(RANKS)), *PAIRS]
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


def _deltas(u: torch.Tensor, *lora_b: torch.Tensor) -> torch.Tensor:
    return lora_deltas(u, lora_b, 0.5)


def _flops(tokens: int) -> float:
    return 2.0 * tokens * sum(size * rank for size, rank in PAIRS)


def _bytes(tokens: int) -> int:
    """u and B read, the result written; two bytes a number."""
    return 2 * (tokens * (sum(RANKS) + sum(SIZES)) + sum(size * rank for size, rank in PAIRS))


def test_launched() -> None:
    with Trace() as trace:
        _deltas(*_operands(100))
    work = trace.work.pop("skinny")
    assert not trace.work
    assert (work.count, work.flops, work.num_bytes) == (2, _flops(100), _bytes(100))


def test_compiled() -> None:
    (kernel,) = program_of(make_fx(_deltas)(*_operands(TOKENS))).kernels
    assert kernel.kind == "skinny" and len(kernel.makes) == 1 and kernel.launches == 2
    assert (kernel.flops(100), kernel.moved(100)) == (_flops(100), _bytes(100))
