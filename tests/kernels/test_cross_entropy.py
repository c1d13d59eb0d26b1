"""Head and cross-entropy in one pass against the definition."""

import pytest
import torch
import torch.nn.functional as F

from tunefork.kernels import cross_entropy, reference


@pytest.mark.parametrize("tokens_per_chunk", [1, 3, 1000])
@pytest.mark.parametrize("num_tokens", [1, 7, 12])
def test_equals_the_definition(
    num_tokens: int, tokens_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, features = 33, 8
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * vocabulary * tokens_per_chunk)
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, features, requires_grad=True)
    weight = (3 * torch.randn(vocabulary, features)).requires_grad_()
    targets = torch.randint(0, vocabulary, (num_tokens,))
    expected = reference.linear_cross_entropy(hidden, weight, targets)
    actual = cross_entropy.linear_cross_entropy_sum(hidden, weight, targets)
    torch.testing.assert_close(actual, expected.sum())
    torch.testing.assert_close(
        cross_entropy.linear_cross_entropy(hidden, weight, targets), expected.detach()
    )
    for got, want in zip(
        torch.autograd.grad(actual / 5, (hidden, weight)),
        torch.autograd.grad(expected.sum() / 5, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = torch.full((2, 4), 100.0), torch.full((5, 4), 100.0)
    loss = cross_entropy.linear_cross_entropy(hidden, weight, torch.tensor([0, 4]))
    torch.testing.assert_close(loss, torch.full((2,), 5.0).log())


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    cross_entropy.linear_cross_entropy_sum(hidden, weight, torch.tensor([0, 1, 2])).backward()
    assert hidden.grad is not None and weight.grad is None


def test_no_supervised_token_is_a_zero_loss() -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4)
    loss = cross_entropy.linear_cross_entropy_sum(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert float(loss.detach()) == 0.0


def test_ignored_targets_add_exactly_nothing() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(33, 8)
    targets = torch.tensor([3, -100, 0, -100])
    cross_entropy.linear_cross_entropy_sum(hidden, weight, targets).backward()
    assert hidden.grad is not None and not hidden.grad[1::2].any()
    losses = cross_entropy.linear_cross_entropy(hidden.detach(), weight, targets)
    assert not losses[1::2].any()
    expected = F.cross_entropy(hidden.detach() @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(losses, expected)
