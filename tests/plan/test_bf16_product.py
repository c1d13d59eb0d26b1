"""The operator of bf16 products with narrow ones inside, as a plan counts it: one kernel."""

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tunefork.kernels.bf16_product import bf16_product
from tunefork.kernels.compiled import standing_for_gpu
from tunefork.plan.graph import TOKENS, program_of
from tunefork.plan.trace import Trace

SIZES, COLUMNS, NARROW = (128, 96), 160, 24


def _operands(tokens: int, has_narrow: bool) -> list[torch.Tensor]:
    """What several layers' gradients are, their weights, and LoRA's two factors."""
    shapes = [*((tokens, size) for size in SIZES), (sum(SIZES), COLUMNS)]
    shapes += [(tokens, NARROW), (NARROW, COLUMNS)] if has_narrow else []
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


def _turned(first: Any, second: Any, b: Any, u: Any, v: Any) -> Any:
    with standing_for_gpu(lambda *_: None):
        return bf16_product([first, second], b, u, v, is_turned=True)


def _plain(first: Any, second: Any, b: Any) -> Any:
    return _turned(first, second, b, None, None)


def _as_forward(a: Any, b: Any, u: Any, v: Any) -> Any:
    with standing_for_gpu(lambda *_: None):
        return bf16_product([a], b, u, v, is_turned=False)


def _flops(tokens: int, has_narrow: bool) -> float:
    return 2.0 * tokens * COLUMNS * (sum(SIZES) + (NARROW if has_narrow else 0))


def _bytes(tokens: int, has_narrow: bool) -> int:
    """Each operand read, the result written; two bytes a number."""
    inner = sum(SIZES) + (NARROW if has_narrow else 0)
    return 2 * ((tokens + COLUMNS) * inner + tokens * COLUMNS)


@pytest.mark.parametrize("has_narrow", [False, True])
def test_launched(has_narrow: bool) -> None:
    operands = _operands(100, has_narrow)
    with Trace() as trace:
        (_turned if has_narrow else _plain)(*operands)
    work = trace.work.pop("gemm")
    assert not trace.work
    assert (work.count, work.flops) == (1, _flops(100, has_narrow))
    assert work.num_bytes == _bytes(100, has_narrow)


@pytest.mark.parametrize("has_narrow", [False, True])
def test_compiled(has_narrow: bool) -> None:
    function = _turned if has_narrow else _plain
    (kernel,) = program_of(make_fx(function)(*_operands(TOKENS, has_narrow))).kernels
    assert (kernel.kind, kernel.launches) == ("gemm", 1)
    assert kernel.flops(100) == _flops(100, has_narrow)
    assert kernel.moved(100) == _bytes(100, has_narrow)


def test_forward_a_weight_lies_the_other_way() -> None:
    shapes = ((100, sum(SIZES)), (COLUMNS, sum(SIZES)), (100, NARROW), (COLUMNS, NARROW))
    with Trace() as trace:
        _as_forward(*(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes))
    assert (trace.work["gemm"].flops, trace.work["gemm"].num_bytes) == (
        _flops(100, True),
        _bytes(100, True),
    )
