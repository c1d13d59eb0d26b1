"""A second run is given what attention made, and its gradient is that of making it again."""

from typing import Any

import pytest
import torch

from tunefork.model.attention_reference import gradients, reference, with_sums
from tunefork.model.kept_attention import Results, segments, whole_rows


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_by_equation_are_those_of_the_definition(window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(18, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    starts, dout = torch.tensor([0, 5, 6, 15, 18]), torch.randn(18, 4, 8, dtype=torch.float64)
    options: dict[str, Any] = {"scale": 0.3, "window": window}
    want = torch.autograd.grad(reference(q, k, v, starts, 9, **options), (q, k, v), dout)
    with torch.no_grad():
        made = with_sums(q, k, v, starts, **options)
        by_equation = gradients(dout, q, k, v, *made, starts, **options)
    results = Results(False, [])
    with torch.no_grad():
        segments(results, q, k, v, starts, 9, **options)
    given = torch.autograd.grad(segments(results, q, k, v, starts, 9, **options), (q, k, v), dout)
    assert results.kept == []
    for one, other, expected in zip(by_equation, given, want, strict=True):
        torch.testing.assert_close(one, expected)
        torch.testing.assert_close(other, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo
def test_cudnns_way_can_be_traced() -> None:
    """On the meta device, where the operators have shapes and no kernels."""
    with torch.device("meta"):
        q = torch.empty(2, 8, 256, 64, dtype=torch.bfloat16, requires_grad=True)
        k, v = (
            torch.empty(2, 2, 256, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
        )
    results = Results(True, [])
    with torch.no_grad():
        assert whole_rows(results, q, k, v, scale=0.1).shape == (2, 256, 8, 64)
    assert [x.shape for x in results.kept] == [(2, 256, 8, 64), (2, 8, 256, 1)]
    torch._dynamo.reset()
    again = torch.compile(whole_rows, backend="aot_eager", fullgraph=True)
    out = again(results, q, k, v, scale=0.1)
    out.sum().backward()
    assert q.grad is not None and k.grad is not None and k.grad.shape == k.shape
