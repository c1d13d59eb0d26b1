"""LoRA's deltas, side by side, against products of fp64."""

import pytest
import torch

from tunefork.kernels.lora_deltas import lora_deltas

SCALE = 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(4,), (4, 0, 2), (0, 3)])
def test_each_layer_has_its_product_and_one_without_a_delta_zeros(
    ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    # Columns of something wider, as the engine has them.
    u = torch.randn(7, sum(ranks) + 3).to(dtype)[:, : sum(ranks)]
    lora_b = [torch.randn(5 + rank, rank).to(dtype) for rank in ranks]
    found = lora_deltas(u, lora_b, SCALE)
    columns = torch.split(u.double(), list(ranks), dim=1)
    exact = [SCALE * c @ b.double().t() for c, b in zip(columns, lora_b, strict=True)]
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), torch.cat(exact, dim=1), rtol=tolerance, atol=1e-6)
    assert found.dtype == dtype and found.is_contiguous()


def test_a_turned_b_is_read_as_it_lies() -> None:
    u, a = torch.randn(6, 3), torch.randn(3, 11)
    torch.testing.assert_close(lora_deltas(u, [a.t()], 1.0), u @ a)


def test_what_memory_held_before_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_nan(u: torch.Tensor, *shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", of_nan)
    u, b = torch.randn(6, 3), torch.randn(4, 3)
    found = lora_deltas(u, [b, torch.zeros(2, 0)], 1.0)
    torch.testing.assert_close(found, torch.cat([u @ b.t(), torch.zeros(6, 2)], dim=1))


def test_the_operator_is_what_it_says_to_a_compiler() -> None:
    arguments = (torch.randn(6, 5), [torch.randn(4, 3), torch.randn(3, 2)], SCALE)
    torch.library.opcheck(torch.ops.tunefork.lora_deltas.default, arguments)
