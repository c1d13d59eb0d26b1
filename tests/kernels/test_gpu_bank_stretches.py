"""Sums of rows on a GPU, which takes them in fp32, against a CPU's."""

import pytest
import torch

from tunefork.kernels.bank_stretches import Stretch, add_stretches, lay_out
from tunefork.kernels.bank_tables import TERMS, Matrices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_gpus_sums_are_a_cpus() -> None:
    torch.manual_seed(0)
    shape = (4, 2 * TERMS, 64, (96, 32, 32), torch.float32)
    here, there = Matrices(*shape), Matrices(*shape, torch.device("cuda"))
    for slot in range(4):
        for layer, size in enumerate(shape[3]):
            matrices = torch.randn(2 * TERMS, 64), torch.randn(2 * TERMS, size)
            here.write(layer, slot, *matrices)
            there.write(layer, slot, *(one.cuda() for one in matrices))
    stretches = [Stretch(0, 0, 2), Stretch(2, 2, 3), Stretch(1, 5, 45), Stretch(3, 45, 85)]
    ranks = [4, 20, 32, 32]  # indices are made where matrices lie: a layout for each
    x_sd, y_so = torch.randn(90, 64), torch.randn(90, 160)
    found = y_so.cuda()
    add_stretches(found, x_sd.cuda(), there, lay_out(stretches, ranks))
    add_stretches(y_so, x_sd, here, lay_out(stretches, ranks))
    assert (found.cpu() - y_so).norm() < 1e-3 * y_so.norm()  # TF32 would be as far as that
