"""The Triton kernel that writes LoRA's deltas, on a GPU, and what is added to them."""

import pytest
import torch

from tunefork.kernels.lora_deltas import LARGEST_RANK, lora_deltas

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SCALE = 0.7


@pytest.mark.parametrize("ranks", [(16,), (16, 0, 8), (1, 5, 33), (LARGEST_RANK,), (128, 16)])
@pytest.mark.parametrize("tokens", [1, 100, 4099])
def test_one_rounding_from_float64(tokens: int, ranks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    u = torch.randn(tokens, sum(ranks) + 24, device="cuda").bfloat16()[:, : sum(ranks)]
    lora_b = [torch.randn(r * 3 + 200, r, device="cuda").bfloat16() for r in ranks]
    found = lora_deltas(u, lora_b, SCALE)
    columns = torch.split(u.double(), list(ranks), dim=1)
    exact = [SCALE * c @ b.double().t() for c, b in zip(columns, lora_b, strict=True)]
    # 2**-9 of itself for bf16, and of the sum's largest terms for fp32.
    torch.testing.assert_close(found.double(), torch.cat(exact, dim=1), rtol=2**-8, atol=1e-4)


def test_the_order_of_product_and_delta_changes_no_bit() -> None:
    torch.manual_seed(0)
    x, w = (torch.randn(n, 512, device="cuda").bfloat16() for n in (2048, 1024))
    u, b = (torch.randn(n, 16, device="cuda").bfloat16() for n in (2048, 1024))
    later = (x @ w.t()).addmm_(u, b.t(), alpha=SCALE)
    first = lora_deltas(u, [b], SCALE).addmm_(x, w.t())
    # Both round the product and the delta to bf16, and their sum; a sum of fp32 may fall otherwise
    # by the order of its terms, which cuBLAS chooses.
    assert (later != first).float().mean() < 1e-3
    torch.testing.assert_close(first, later, rtol=2**-6, atol=2**-6)


def test_a_turned_b_is_read_as_it_lies() -> None:
    u = torch.randn(300, 48, device="cuda").bfloat16()
    a = torch.randn(48, 1000, device="cuda").bfloat16()
    torch.testing.assert_close(
        lora_deltas(u, [a.t()], 1.0).double(), u.double() @ a.double(), rtol=2**-8, atol=1e-4
    )
