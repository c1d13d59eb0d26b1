"""The Triton kernel that quantises rows against its definition, and a served layer on a GPU."""

import pytest
import torch

from tunefork.kernels.e4m3 import quantize_rows, quantize_rows_reference
from tunefork.kernels.fp8 import fp8_linear, fp8_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("size", [28672, 4096, 576])
def test_the_kernel_is_the_definition(size: int) -> None:
    torch.manual_seed(0)
    whole = torch.randn(33, size + 64, device="cuda").bfloat16()
    x = whole[:, :size]  # rows that do not follow each other
    x[1] *= 1e4  # an outlier's row
    x[2, 5] = 3e3
    x[3] = 0
    x[4, 7], x[5, 7] = torch.nan, -torch.inf
    codes, scale = quantize_rows(x)
    want_codes, want_scale = quantize_rows_reference(x)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(codes.float().isnan(), want_codes.float().isnan())
    difference = (codes.float() - want_codes.float()).nan_to_num().abs()
    # An inverse that differs in its last bit moves what lies between two codes to the other one.
    assert (difference > 0).float().mean() < 4e-3
    assert bool((difference <= want_codes.float().nan_to_num().abs() / 8 + 2**-9).all())
    assert not quantize_rows(x[:0])[0].numel()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_served_layer_is_the_definition(is_compiled: bool) -> None:
    torch.manual_seed(0)
    sizes = (4096, 1024)
    weights = [torch.randn(size, 4096).bfloat16() / 64 for size in sizes]
    x = torch.randn(3, 11, 4096).bfloat16()
    x[1, 4, 5] = torch.nan
    linear = torch.compile(fp8_linear, fullgraph=True) if is_compiled else fp8_linear
    found = linear(x.cuda(), *fp8_weight([weight.cuda() for weight in weights]), sizes)
    for y, wanted in zip(found, fp8_linear(x, *fp8_weight(weights), sizes), strict=True):
        assert torch.equal(y.isfinite().cpu(), wanted.isfinite())
        # Of the accumulator's 13 bits of fraction, bf16's 8, and codes that go the other way.
        error = (y.cpu().double() - wanted.double()).nan_to_num()
        assert error.norm() / wanted.double().nan_to_num().norm() < 0.02
