"""The CPU attention against PyTorch's own."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tunefork.model import attention


class _Module(nn.Module):
    is_causal = True
    num_key_value_groups = 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "values"), [(5, 5, 8), (1, 7, 8), (2, 9, 8), (5, 5, 4)]
)
def test_equals_sdpa(queries: int, keys: int, values: int, masked: bool) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, queries, 8, requires_grad=True)
    k = torch.randn(2, 2, keys, 8, requires_grad=True)
    v = torch.randn(2, 2, keys, values, requires_grad=True)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if masked:
        mask = mask & (torch.rand(2, 1, queries, keys) > 0.4)
        mask[..., 0] = True
    given = mask if masked else None
    # SDPA's is_causal aligns queries with the first keys, so it is given the mask outright.
    expected, _ = sdpa_attention_forward(_Module(), q, k, v, mask.expand(2, 1, -1, -1))
    actual, _ = attention.attention(_Module(), q, k, v, given)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad(actual, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_long_rows_take_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def spy(*arguments: object, **options: object) -> tuple[torch.Tensor, None]:
        called.append(options)
        return torch.zeros(()), None

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    x = torch.zeros(1, 2, attention.LONGEST_ROW + 1, 4)
    attention.attention(_Module(), x, x, x, None)
    assert len(called) == 1
