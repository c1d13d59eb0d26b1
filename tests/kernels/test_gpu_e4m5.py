"""The Triton kernels that draw e4m3 of ten bits against their definition, on a GPU."""

import pytest
import torch

from tunefork.kernels.e4m3 import joined
from tunefork.kernels.e4m5 import DrawnRows, drawn, e4m5_dense, e4m5_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    ("sizes", "features_in"),
    [((4096, 1024, 1024), 4096), ((512,), 14336), ((136, 33), 576), ((7,), 16), ((32,), 96)],
)
def test_the_kernels_are_the_definition(
    sizes: tuple[int, ...], features_in: int, is_compiled: bool
) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(size, features_in, device="cuda").bfloat16() for size in sizes]
    weights[0][3] = 0
    weights[0][4] *= 100
    high_od, low_oq, scales_2o = e4m5_weight(weights)
    on_cpu = e4m5_weight([weight.cpu() for weight in weights])
    # The compiler's inverse of a scale may differ in its last bit: a weight that lies between two,
    # as one of bf16's eight bits often does, then goes to the other one.
    assert (high_od.cpu() != on_cpu[0]).float().mean() < 1e-3
    assert (low_oq.cpu() != on_cpu[1]).float().mean() < 5e-3
    whole = torch.cat(weights).float()
    dense = e4m5_dense(high_od, low_oq, scales_2o[0], torch.bfloat16).float()
    assert (dense - whole).norm() < 0.01 * whole.norm()

    seed = torch.tensor([12345, 6, 3, 8], dtype=torch.int32, device="cuda")
    # Rows of words begin at one; of the widest, 1,088, more than are copied at a time.
    width = (64 if len(high_od) > 1000 else 1088) if len(high_od) % 4 == 0 else 61
    right = torch.randint(0, 100, (len(high_od), 64), dtype=torch.uint8, device="cuda")
    below = torch.randint(0, 100, (features_in, width), dtype=torch.uint8, device="cuda")

    def all_four() -> tuple[torch.Tensor, ...]:
        rows = DrawnRows(high_od, low_oq, scales_2o, seed)
        return rows.codes(right), rows.codes(), rows.codes_turned(below), rows.codes_turned()

    found = (torch.compile(all_four, fullgraph=True) if is_compiled else all_four)()
    straight, turned = (drawn(high_od, low_oq, seed[at], seed[2]) for at in (1, 0))
    turned = turned.t()
    assert 0.1 < (straight != turned.t()).float().mean() < 0.5
    wanted = (joined([straight, right]), straight, joined([turned, below]), turned)
    for codes, want in zip(found, wanted, strict=True):
        assert torch.equal(codes.view(torch.uint8), want)
