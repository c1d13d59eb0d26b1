"""The kernel of `kernels/cross_entropy.py` on a GPU against the definition."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels import cross_entropy
from tunefork.kernels.cross_entropy import IGNORED

pytestmark = pytest.mark.gpu


def _both(logits: Tensor, targets: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Losses and gradients of the kernel, and of the definition in fp32."""
    ours, theirs = logits.clone(), logits.float().cpu()
    losses = torch.ops.tunefork.to_gradient_(ours, targets)
    expected = cross_entropy._to_gradient_(theirs, torch.empty_like(theirs), targets.cpu())
    return (losses, ours), (expected.cuda(), theirs.cuda())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1, 33, 8192, 50_257, 128_256])
@pytest.mark.parametrize("kind", ["random", "large", "peaked", "equal"])
def test_the_kernel_is_the_definition(dtype: torch.dtype, vocabulary: int, kind: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, vocabulary, device="cuda")
    match kind:
        case "large":
            logits += 1e4
        case "peaked":
            logits *= 30
        case "equal":
            logits.fill_(7.0)
    targets = torch.randint(0, vocabulary, (7,), device="cuda")
    targets[2] = IGNORED
    (losses, gradient), (expected, gradient_fp32) = _both(logits.to(dtype), targets)
    torch.testing.assert_close(losses, expected, rtol=3e-6, atol=3e-6)
    within = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.float(), gradient_fp32, rtol=within, atol=2e-6)
    assert losses[2] == 0 and not gradient[2].any()


def test_rows_of_a_wider_tensor_and_columns_that_are_barred() -> None:
    torch.manual_seed(0)
    wide = torch.randn(5, 1000, device="cuda")
    wide[:, 40:60] = -torch.inf
    targets = torch.tensor([0, 3, IGNORED, 899, 7], device="cuda")
    (losses, gradient), (expected, gradient_fp32) = _both(wide[:, :900].contiguous(), targets)
    torch.testing.assert_close(losses, expected, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(gradient, gradient_fp32, rtol=1e-5, atol=2e-6)
    of_a_part = wide.clone()
    again = torch.ops.tunefork.to_gradient_(of_a_part[:, :900], targets)
    assert torch.equal(again, losses) and torch.equal(of_a_part[:, :900], gradient)
    assert torch.equal(of_a_part[:, 900:], wide[:, 900:])


def test_lowest_logits_and_targets_that_are_apart() -> None:
    logits = torch.full((4, 50), torch.finfo(torch.float32).min, device="cuda")
    logits[1], logits[2, 7] = -3.2e38, 0.0
    targets = torch.arange(8, device="cuda")[::2]
    (losses, gradient), (expected, gradient_fp32) = _both(logits, targets)
    torch.testing.assert_close(losses, expected, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(gradient, gradient_fp32, rtol=1e-5, atol=2e-6)


def test_a_row_that_is_no_number_stays_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3000, device="cuda", dtype=torch.bfloat16)
    logits[1, 2999], logits[2, 5] = torch.nan, torch.inf
    targets = torch.tensor([1, 2, 3, 4], device="cuda")
    losses = torch.ops.tunefork.to_gradient_(logits, targets)
    assert losses.isfinite().tolist() == [True, False, False, True]
    assert logits.isfinite().all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("target", [50, 10**12, -1, -101])
def test_a_target_that_is_none_gives_a_loss_that_is_no_number(target: int) -> None:
    logits = torch.randn(3, 50, device="cuda")
    losses = torch.ops.tunefork.to_gradient_(logits, torch.tensor([4, target, 7], device="cuda"))
    assert losses.isnan().tolist() == [False, True, False]


def test_the_bits_are_the_same_each_time() -> None:
    torch.manual_seed(0)
    logits = torch.randn(300, 128_256, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 128_256, (300,), device="cuda")
    first, second = logits.clone(), logits.clone()
    losses = torch.ops.tunefork.to_gradient_(first, targets)
    assert torch.equal(losses, torch.ops.tunefork.to_gradient_(second, targets))
    assert torch.equal(first, second)


@pytest.mark.parametrize("num_tokens", [0, 1, 700])
def test_the_heads_loss_and_gradient_are_pytorchs(num_tokens: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5000, 64, device="cuda", dtype=torch.bfloat16) / 8
    targets = torch.randint(0, 5000, (num_tokens,), device="cuda")
    total = cross_entropy.linear_cross_entropy_sum(hidden, weight, targets)
    [ours] = torch.autograd.grad(total, hidden)
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ weight.double().t()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    [theirs] = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-4)
    assert float((ours.double() - theirs).norm()) <= 0.01 * float(theirs.norm())
