"""Directions apart on a GPU: what holds on a CPU holds there."""

import pytest
import torch

from tests.kernels.test_directions import check
from tunefork.kernels.layout import Storage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("rank", [0, 16, 64])
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_products_of_inputs_like_those_are_closer(storage: Storage, rank: int) -> None:
    check(storage, rank, torch.device("cuda"))
