"""The Triton kernel that quantises rows against its definition, on a GPU."""

import pytest
import torch

from tunefork.kernels.e4m3 import quantize_rows, quantize_rows_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("has_fold", [False, True])
@pytest.mark.parametrize(
    ("sizes", "rank", "width"),
    [((4096,), 16, 64), ((4096, 1024, 1024), 48, 192), ((14336, 14336), 32, 128), ((576,), 0, 0)],
)
def test_the_kernel_is_the_definition(
    sizes: tuple[int, ...], rank: int, width: int, has_fold: bool
) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(33, size, device="cuda").bfloat16() for size in sizes]
    parts[0][1] *= 1e4  # an outlier's row
    parts[0][2, 5] = 3e3
    for part in parts:
        part[3] = 0
    whole = torch.cat(parts, dim=1)
    views = list(torch.split(whole, list(sizes), dim=1))  # rows that do not follow each other
    fold = torch.rand(1, sum(sizes), device="cuda") if has_fold else None
    u = torch.randn(33, rank, device="cuda").bfloat16() if rank else None
    balance = torch.tensor(4.0, device="cuda") if rank else None
    codes, scale = quantize_rows(views, fold, u, balance, width)
    want_codes, want_scale = quantize_rows_reference(views, fold, u, balance, width)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)
    difference = (codes.float() - want_codes.float()).abs()
    # An inverse that differs in its last bit moves what lies between two codes to the other one,
    # and a low part to the other end of its range, half a step of 32 times 16 either way.
    assert (difference > 0).float().mean() < 4e-3
    first_low = sum(sizes) + rank
    high = difference[:, :first_low] <= want_codes[:, :first_low].float().abs() / 8 + 2**-9
    assert bool(high.all()) and float(difference.max()) <= 512.0


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    x = torch.randn(8, 256, device="cuda").bfloat16()
    before, _ = quantize_rows([x], None, None, None, 0)
    x[3, 7] = float("nan")
    after, _ = quantize_rows([x], None, None, None, 0)
    others = [row for row in range(8) if row != 3]
    assert torch.equal(after.view(torch.uint8)[others], before.view(torch.uint8)[others])
    assert after[3].float().isnan().any()


def test_a_delta_that_is_not_finite_is_seen_in_its_own_row() -> None:
    """Saturated to a number, it would leave a loss that looks sound."""
    x = torch.randn(8, 256, device="cuda").bfloat16()
    u = torch.randn(8, 16, device="cuda").bfloat16()
    balance = torch.tensor(1.0, device="cuda")
    before, scale = quantize_rows([x], None, u, balance, 64)
    for value in (torch.nan, torch.inf):
        kept, u[3, 2] = u[3, 2].clone(), value
        after, after_scale = quantize_rows([x], None, u, balance, 64)
        assert (after[3].float() * after_scale[3]).isnan().any()
        others = [row for row in range(8) if row != 3]
        assert torch.equal(after.view(torch.uint8)[others], before.view(torch.uint8)[others])
        assert torch.equal(after_scale[others], scale[others])
        u[3, 2] = kept
