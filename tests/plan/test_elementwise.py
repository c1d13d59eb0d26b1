"""What is remembered of elementwise operations is what PyTorch says of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tunefork.plan import elementwise

ATEN = torch.ops.aten


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


WIDE, HALF = _meta(4, 6), _meta(6, dtype=torch.bfloat16)
QUESTIONS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (ATEN.mul.Tensor, (WIDE, WIDE), {}),
    (ATEN.mul.Tensor, (WIDE, HALF), {}),
    (ATEN.mul.Tensor, (HALF, HALF), {}),
    (ATEN.mul.Tensor, (HALF, 2), {}),
    (ATEN.mul.Tensor, (_meta(6, dtype=torch.int64), 2), {}),
    (ATEN.mul.Tensor, (_meta(6, dtype=torch.int64), 2.0), {}),
    (ATEN.mul.Tensor, (WIDE.t(), WIDE.t()), {}),
    (ATEN.mul.Tensor, (_meta(6, 4), _meta(6, 4)), {}),
    (ATEN.add.Tensor, (_meta(4, 1), HALF), {"alpha": 3}),
    (ATEN.gt.Scalar, (WIDE, 0.5), {}),
    (ATEN.silu.default, (WIDE.t(),), {}),
    (ATEN.where.self, (_meta(6, dtype=torch.bool), WIDE, HALF), {}),
    (ATEN.add_.Tensor, (WIDE, 1.0), {}),
    (ATEN.sum.default, (WIDE,), {}),
]


def _told(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def test_the_second_answer_is_pytorchs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_GIVEN", {})
    for _ in range(2):  # asked before all others, and after them
        for func, args, kwargs in QUESTIONS:
            assert _told(elementwise.call(func, args, kwargs)) == _told(func(*args, **kwargs))
    assert len(elementwise._GIVEN) == len(QUESTIONS) - 2
    assert elementwise.call(ATEN.add_.Tensor, (WIDE, 1.0), {}) is WIDE
    first, second = (elementwise.call(*QUESTIONS[0]) for _ in range(2))
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_tensors_with_numbers_are_computed() -> None:
    two = torch.tensor([2.0])
    for _ in range(2):
        assert elementwise.call(ATEN.mul.Tensor, (two, two), {}).item() == 4.0
