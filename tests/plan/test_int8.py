"""The operators of int8 products, as a plan counts them: what is read twice, how many kernels."""

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tunefork.kernels.compiled import standing_for_gpu
from tunefork.kernels.int8_product import int8_product
from tunefork.kernels.int8_rows import round_apart
from tunefork.plan.graph import TOKENS, program_of
from tunefork.plan.operators import kernels_of
from tunefork.plan.trace import Trace

INNER, COLUMNS, NARROW, APART = 160, 96, 72, 48


def _operands(tokens: int) -> list[torch.Tensor]:
    """x, what is read of it, V^T; a weight's codes and scales, what is multiplied in bf16."""
    wide = [(tokens, INNER), (tokens, NARROW), (APART, INNER), (COLUMNS, NARROW)]
    x, inner, probe, beside = (torch.empty(shape, dtype=torch.bfloat16) for shape in wide)
    codes = torch.empty(COLUMNS, INNER, dtype=torch.int8)
    return [t.to("meta") for t in (x, inner, probe, codes, torch.empty(1, COLUMNS), beside)]


def _product(x: Any, inner: Any, probe: Any, weight: Any, scale: Any, beside: Any) -> Any:
    with standing_for_gpu(lambda *_: None):
        codes, scale_s1 = round_apart(x, inner, probe)
        return int8_product(codes, weight, scale_s1, scale, inner, beside)


def _rounded_bytes(tokens: int) -> int:
    """x twice, what is read of it, V^T; the codes and their scales."""
    return 2 * (tokens * (2 * INNER + NARROW) + APART * INNER) + tokens * (INNER + 4)


def _product_bytes(tokens: int) -> int:
    """Codes and scales of both sides, the narrow ones, y."""
    codes = (tokens + COLUMNS) * (INNER + 4)
    return codes + 2 * ((tokens + COLUMNS) * NARROW + tokens * COLUMNS)


def _flops(tokens: int) -> float:
    """A product in bf16 takes as long as two in int8."""
    return 2.0 * tokens * COLUMNS * (INNER + 2 * NARROW)


def test_launched() -> None:
    operands = _operands(100)
    with Trace() as trace:
        _product(*operands)
    rounded, product = trace.work.pop("memory"), trace.work.pop("gemm_int8")
    assert not trace.work
    assert (rounded.count, rounded.num_bytes) == (3, _rounded_bytes(100))
    assert (product.count, product.flops) == (1, _flops(100))
    assert product.num_bytes == _product_bytes(100)


def test_compiled() -> None:
    rounded, product = program_of(make_fx(_product)(*_operands(TOKENS))).kernels
    assert (rounded.kind, rounded.launches) == ("fused", 3)
    assert rounded.moved(100) == _rounded_bytes(100)
    assert (product.kind, product.launches) == ("gemm_int8", 1)
    assert (product.flops(100), product.moved(100)) == (_flops(100), _product_bytes(100))


@pytest.mark.parametrize("name", ["nf4_int8", "nf4_int8_turned"])
def test_each_layer_of_nf4_has_a_kernel(name: str) -> None:
    operator = getattr(torch.ops.tunefork, name).default
    tensors = [torch.empty(8, device="meta")] * 10  # five a layer
    with Trace() as trace:
        operator(tensors, torch.empty(96, device="meta"), 64)
    assert trace.work["memory"].count == kernels_of(operator, [tensors]) == 2
