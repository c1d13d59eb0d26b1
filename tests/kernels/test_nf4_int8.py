"""NF4 as an operand of an int8 product: what it is, and that its rows' scales need no reading."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels.nf4_int8 import Nf4Rows, nf4_scales
from tunefork.kernels.quantized import dequantize_nf4_tensors, nf4_tensors, quantize_nf4


def _stored(sizes: tuple[int, ...], features_in: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    weights = [torch.randn(size, features_in).bfloat16() for size in sizes]
    weights[0][3] = 0
    weights[0][4] *= 100
    if features_in == 128:
        weights[0][5] *= 0.01  # its blocks' maxima, beside such, are kept as negative numbers
    return sum((nf4_tensors(*quantize_nf4(weight)) for weight in weights), ())


@pytest.mark.parametrize("features_in", [128, 96, 33], ids=["whole blocks", "of two rows", "odd"])
def test_rows_are_the_weight_over_its_scale(features_in: int) -> None:
    sizes = (32, 16)
    tensors = _stored(sizes, features_in)
    weight = dequantize_nf4_tensors(tensors, sizes, features_in, torch.bfloat16).double()
    scales = nf4_scales(tensors, sizes, features_in)
    rows = Nf4Rows(tensors, scales, sizes, features_in)
    codes = rows.codes()
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    scale = rows.scale_1o.t().double()
    # Half a scale, and a hair: what lies between two codes may go to either.
    assert ((codes * scale - weight).abs() <= scale * (0.5 + 1e-4)).all()
    largest, others = codes.int().abs().amax(1), torch.arange(48) != 3
    assert not largest[3] and (largest[others] == 127).all()
    assert torch.equal(scales[0, others], weight.abs().amax(1)[others].float() / 127)
    assert scales.isfinite().all() and torch.equal(scales[1], scales[0].reciprocal())
    turned = rows.codes_turned()
    assert turned.is_contiguous() and torch.equal(turned, codes.t())
