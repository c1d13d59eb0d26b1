"""The bf16 product where its kernel is not: what it copies, and when."""

import pytest
import torch

from tunefork.kernels import bf16_product as dispatch


@pytest.mark.parametrize(
    ("m", "n", "k", "count", "copies"),
    [
        (16_384, 4096, 4112, 2, True),
        (16_384, 4096, 28_704, 3, True),
        (64, 4096, 4112, 2, False),  # the weight would be copied for 64 rows
        (1024, 4096, 14_352, 2, False),
    ],
)
def test_operands_are_copied_where_that_is_less_than_sums_are(
    m: int, n: int, k: int, count: int, copies: bool
) -> None:
    assert dispatch._copying_is_less(m, n, k, count) == copies


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("has_narrow", [False, True])
def test_side_by_side_they_give_the_definition(
    has_narrow: bool, is_turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_copying_is_less", lambda *_: True)
    monkeypatch.setattr(dispatch, "_AT_A_TIME", 1)
    monkeypatch.setattr(dispatch, "_LEAST_AT_A_TIME", 7)
    torch.manual_seed(0)
    parts, b = [torch.randn(30, 16), torch.randn(30, 24)], torch.randn(40, 48)
    u, v = torch.randn(30, 8), torch.randn(8, 48)
    if not is_turned:
        b, v = b.t().contiguous(), v.t().contiguous()
    narrow = (u, v) if has_narrow else ()
    found = dispatch._by_cublas(parts, b, narrow, is_turned)
    given = (u, v) if has_narrow else (None, None)
    wanted = dispatch.bf16_product_reference(parts, b, *given, is_turned=is_turned)
    torch.testing.assert_close(found, wanted)
