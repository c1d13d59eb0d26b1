"""The bf16 product where its kernel is not: what it copies, and when."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels import bf16_product as dispatch
from tunefork.kernels.narrow_product import HOPPER


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


def _rows(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("few tokens", _rows(dispatch._LEAST_ROWS - 1, 64)),
        ("features in", _rows(2048, 100)),
        ("a part of a wider matrix", _rows(2048, 104)[:, :100]),
        ("a vocabulary of 32,003", _rows(2048, 32_003)),
        ("rows that start anywhere", _rows(2048, 100)[:, :64]),
        ("an address that is no multiple of 16", _rows(2048, 128)[:, 4:68]),
    ],
)
def test_the_kernel_is_asked_for_nothing_that_it_cannot_do(
    name: str, matrix: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: HOPPER)
    one, many = _rows(2048, 64), _rows(64, 64)
    assert dispatch._takes([one, many, one])
    assert not dispatch._takes([matrix, many, one])
    if name != "few tokens":
        assert not dispatch._takes([one, matrix, one])
        assert not dispatch._takes([one, many, matrix])
    # Copied first: where they lie now is of no account.
    assert dispatch._takes([one, _rows(1, 64)[:, 4:].expand(64, -1)[:, :56], one])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 1))
    assert not dispatch._takes([one, many, one])
