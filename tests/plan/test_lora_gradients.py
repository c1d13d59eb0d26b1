"""The operator that makes du and B's gradient, as a plan counts it: one reading of each dy, by two
kernels."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tunefork.kernels.compiled import standing_for_gpu
from tunefork.kernels.lora_gradients import lora_gradients
from tunefork.plan.graph import TOKENS, program_of
from tunefork.plan.trace import Trace

SIZES, RANKS = (64, 32), (8, 4)
PAIRS = list(zip(SIZES, RANKS, strict=True))


def _operands(tokens: int) -> list[torch.Tensor]:
    shapes = [*((tokens, size) for size in SIZES), (tokens, sum(RANKS)), *PAIRS]
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


def _gradients(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with standing_for_gpu(lambda *_: None):
        du, db = lora_gradients(operands[:2], operands[2], operands[3:], 0.5)
    return du, *db


def _flops(tokens: int) -> float:
    """Two products a layer, of two operations each."""
    return 4.0 * tokens * sum(size * rank for size, rank in PAIRS)


def _bytes(tokens: int) -> int:
    """Each dy once; u and du; B and its gradient; two bytes a number."""
    once = tokens * sum(SIZES)
    twice = tokens * sum(RANKS) + sum(size * rank for size, rank in PAIRS)
    return 2 * (once + 2 * twice)


def test_launched_it_reads_dy_once() -> None:
    operands = _operands(100)
    with Trace() as trace:
        _gradients(*operands)
    work = trace.work.pop("skinny")
    assert not trace.work
    assert (work.count, work.flops, work.num_bytes) == (4, _flops(100), _bytes(100))


def test_compiled_it_is_one_operation_that_reads_dy_once() -> None:
    (kernel,) = program_of(make_fx(_gradients)(*_operands(TOKENS))).kernels
    assert kernel.kind == "skinny" and len(kernel.makes) == 3 and kernel.launches == 4
    assert (kernel.flops(100), kernel.moved(100)) == (_flops(100), _bytes(100))
