"""The Triton kernels that make int8 of NF4 against their definition, on a GPU."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels.int8_rows import nearest
from tunefork.kernels.nf4_int8 import Nf4Rows, nf4_scales
from tunefork.kernels.quantized import (
    BLOCK,
    dequantize_nf4_tensors,
    nf4_tensors,
    quantize_nf4,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    ("sizes", "features_in"),
    [((4096, 1024, 1024), 4096), ((512,), 14336), ((130, 33), 576), ((7,), 64), ((32,), 96)],
)
def test_the_kernels_are_the_definition(
    sizes: tuple[int, ...], features_in: int, is_compiled: bool
) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(size, features_in, device="cuda").bfloat16() for size in sizes]
    weights[0][3] = 0
    weights[0][4] *= 100
    tensors: tuple[Tensor, ...] = sum((nf4_tensors(*quantize_nf4(w)) for w in weights), ())
    whole = dequantize_nf4_tensors(tensors, sizes, features_in, torch.bfloat16)
    scales_2o = nf4_scales(tensors, sizes, features_in)
    wanted = nearest(whole, scales_2o[:1].t())
    # All rows' but that of zeros, which a GPU's quantisation may give another least number.
    assert int((wanted.int().abs().amax(1) == 127).sum()) >= len(whole) - 1

    def both() -> tuple[Tensor, Tensor]:
        rows = Nf4Rows(tensors, scales_2o, sizes, features_in)
        return rows.codes(), rows.codes_turned()

    codes, turned = (torch.compile(both, fullgraph=True) if is_compiled else both)()
    assert codes.is_contiguous() and turned.is_contiguous()
    # Without the kernel a compiled inverse may differ in its last bit: what lies between two codes
    # then goes to the other one.
    most = 1e-5 if is_compiled and features_in % BLOCK else 0.0
    for found in (codes, turned.t()):
        assert found.dtype == torch.int8
        assert (found != wanted).float().mean() <= most
