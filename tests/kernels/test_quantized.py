"""NF4 there and back."""

import pytest
import torch

from tunefork.kernels.quantized import dequantize_nf4, quantize_nf4


@pytest.mark.parametrize("shape", [(32, 96), (64, 64), (10, 32), (48, 160)])
def test_rows_need_not_be_whole_blocks(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    error = (dequantize_nf4(*quantize_nf4(weight)) - weight).norm() / weight.norm()
    assert 0.07 < error < 0.11
