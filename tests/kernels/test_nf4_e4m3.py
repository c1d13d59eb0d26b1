"""NF4 as an operand of an FP8 product: what it is, and that its rows' scales need no reading."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels.e4m3 import as_codes, joined, row_scale, weight_scales
from tunefork.kernels.nf4_e4m3 import Nf4Rows, nf4_scales
from tunefork.kernels.quantized import dequantize_nf4_tensors, nf4_tensors, quantize_nf4


def _stored(sizes: tuple[int, ...], features_in: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    weights = [torch.randn(size, features_in).bfloat16() for size in sizes]
    weights[0][3] = 0
    weights[0][4] *= 100
    return sum((nf4_tensors(*quantize_nf4(weight)) for weight in weights), ())


def _rows(tensors: tuple[Tensor, ...], sizes: tuple[int, ...], features_in: int) -> Nf4Rows:
    return Nf4Rows(tensors, nf4_scales(tensors, sizes, features_in), sizes, features_in)


@pytest.mark.parametrize("features_in", [128, 96], ids=["whole blocks", "blocks over two rows"])
def test_rows_are_the_weight_over_its_scale(features_in: int) -> None:
    sizes = (32, 16)
    tensors = _stored(sizes, features_in)
    weight = dequantize_nf4_tensors(tensors, sizes, features_in, torch.bfloat16)
    rows = _rows(tensors, sizes, features_in)
    scale = weight_scales([row_scale(weight)])
    assert torch.equal(rows.scale_1o.t(), scale)
    want = as_codes(weight, scale).view(torch.uint8)
    assert torch.equal(rows.codes().view(torch.uint8), want)
    assert torch.equal(rows.codes_turned().view(torch.uint8), want.t())


def test_what_stands_beside_them_is_kept() -> None:
    rows = _rows(_stored((32,), 128), (32,), 128)
    beside = torch.arange(32 * 16).remainder(100).to(torch.uint8).view(32, 16)
    wide = rows.codes(beside).view(torch.uint8)
    assert torch.equal(wide, joined([rows.codes(), beside]))
    beside = torch.arange(128 * 16).remainder(100).to(torch.uint8).view(128, 16)
    wide = rows.codes_turned(beside).view(torch.uint8)
    assert torch.equal(wide, joined([rows.codes_turned(), beside]))
