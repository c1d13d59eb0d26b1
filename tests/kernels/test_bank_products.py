"""Grouped products by a kernel as particular as a GPU's: PyTorch's for a CPU takes any layout."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tests.kernels.test_bank import LENGTHS, RANKS, SCALES
from tunefork.kernels.bank import Padded, grouped, padded_rank, spans
from tunefork.kernels.bank_products import each, sums

ENDS = torch.tensor(LENGTHS).cumsum(0).int()
TOKENS, FEATURES, OUT = sum(LENGTHS), 32, 24


def _as_on_a_gpu(
    a: Tensor, b: Tensor, offs: Tensor, bias: None = None, out_dtype: None = None
) -> Tensor:
    """`aten._grouped_mm`; a GPU's would end the process."""
    bounds = spans(torch.diff(offs, prepend=offs.new_zeros(1)).tolist())
    is_by_token = a.stride(1) == 1 if b.dim() == 3 else (a.stride(0), b.stride(1)) == (1, 1)
    if not is_by_token and any(start % 8 for start, _ in bounds):
        raise AssertionError("expected input tensor dynamic dimension to be a multiple of 16 bytes")
    if b.dim() == 3:
        return torch.cat([a[start:end] @ w for (start, end), w in zip(bounds, b, strict=True)])
    return torch.stack([a[:, start:end] @ b[start:end] for start, end in bounds])


@pytest.fixture
def particular() -> Iterator[None]:
    """Within a test, a grouped product on a CPU is the particular one."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_grouped_mm", _as_on_a_gpu, "CPU")
    yield
    library._destroy()


def _tokens_innermost(*shape: int) -> Tensor:
    return torch.randn(*reversed(shape)).t()


@pytest.mark.usefixtures("particular")
def test_slots_begin_anywhere_however_operands_lie() -> None:
    x, y = _tokens_innermost(TOKENS, FEATURES), _tokens_innermost(TOKENS, OUT)
    w = torch.randn(len(LENGTHS), FEATURES, OUT)
    with pytest.raises(AssertionError, match="16 bytes"):
        torch._grouped_mm(x, w, offs=ENDS)
    bounds = spans(LENGTHS)
    found = each(x, w, ENDS, is_even=False)
    torch.testing.assert_close(
        found, torch.cat([x[s:e] @ own for (s, e), own in zip(bounds, w, strict=True)])
    )
    found = sums(x, y, ENDS, is_even=False)
    torch.testing.assert_close(found, torch.stack([x[s:e].t() @ y[s:e] for s, e in bounds]))


def test_no_compiler_lays_out_an_operand() -> None:
    """Of two layers with one input that has no gradient (a model's first ones), both passes."""
    padded = Padded.of(RANKS, padded_rank(RANKS), SCALES, "cpu")
    rows = [torch.randn(sum(RANKS), width) for width in (FEATURES, FEATURES, OUT, OUT)]

    def gradients(x: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        a, b, c, d = (row.requires_grad_() for row in rows)
        ys = grouped(x, ENDS, [a, b], [c, d], [0, 0], [padded])
        return torch.autograd.grad(ys, [a, b, c, d], [torch.ones_like(y) for y in ys])

    graph = make_fx(gradients)(torch.randn(TOKENS, FEATURES).bfloat16(), *rows).graph
    asked = [str(node.target) for node in graph.nodes]
    assert asked.count("tunefork.sums_by_slot.default") == 3
    assert "aten._grouped_mm.default" not in asked
