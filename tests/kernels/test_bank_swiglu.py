"""gate, up and SwiGLU over each row's own adapter: the definition, and a GPU's kernel."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.bank_reads import draw
from tunefork.kernels.bank_swiglu import swiglu_own


def test_each_row_is_its_own_adapters() -> None:
    read = draw(23, 5, 6, 32, (24, 24))
    slot_s = torch.randint(-1, 5, (23,), dtype=torch.int32)
    gate, up = read.expected(slot_s).split([24, 24], dim=1)
    found = swiglu_own(read.y_so, read.u_sk(), slot_s, read.b, read.rank)
    torch.testing.assert_close(found, F.silu(gate) * up, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("slots", "rank", "features", "size"),
    [(33, 16, 4096, 14336), (5, 16, 576, 1536), (3, 48, 200, 100), (4, 128, 256, 512)],
)
@pytest.mark.parametrize("rows", [2, 24, 64])
def test_the_kernel_is_the_definition(
    rows: int, slots: int, rank: int, features: int, size: int
) -> None:
    read = draw(rows, slots, rank, features, (size, size), dtype=torch.bfloat16, device="cuda")
    mixed = torch.randint(-1, slots, (rows,), dtype=torch.int32, device="cuda")
    for slot_s in (mixed, mixed.clamp(-1, 0), torch.full_like(mixed, slots - 1)):
        gate, up = read.expected(slot_s).split([size, size], dim=1)
        found = swiglu_own(read.y_so, read.u_sk(), slot_s, read.b, rank)
        expected = F.silu(gate) * up
        assert torch.allclose(found.float(), expected, rtol=2**-6, atol=2**-4)
