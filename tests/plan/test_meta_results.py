"""What is remembered of operations is what PyTorch says of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tunefork.plan import meta_results

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
    (ATEN.addmm.default, (HALF, _meta(4, 6).bfloat16(), _meta(6, 6).bfloat16().t()), {}),
    (ATEN.addmm_.default, (WIDE, _meta(4, 3), _meta(3, 6)), {"alpha": 0.5}),
    (ATEN.cat.default, ([WIDE, _meta(2, 6)],), {}),
    (ATEN.cat.default, ([WIDE, WIDE.bfloat16()], -1), {}),
    (ATEN.mean.dim, (WIDE, [-1], True), {}),
    (ATEN.mean.dim, (WIDE.t(), [-1], True), {"dtype": torch.float64}),
    (ATEN.sum.dim_IntList, (_meta(4, 6, dtype=torch.bool), [0]), {}),
    (ATEN.slice_backward.default, (WIDE.t(), [6, 9], 1, 2, 6, 1), {}),
    (ATEN.sum.default, (WIDE,), {}),
]


def _told(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def test_the_second_answer_is_pytorchs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_results, "_GIVEN", {})
    for _ in range(2):  # asked before all others, and after them
        for func, args, kwargs in QUESTIONS:
            assert _told(meta_results.call(func, args, kwargs)) == _told(func(*args, **kwargs))
    assert len(meta_results._GIVEN) == len(QUESTIONS) - 1  # not the last, which is quick
    assert meta_results.call(ATEN.add_.Tensor, (WIDE, 1.0), {}) is WIDE
    first, second = (meta_results.call(*QUESTIONS[0]) for _ in range(2))
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


@pytest.mark.parametrize("shape", [(4, 6), (5, 6)])
def test_what_pytorch_refuses_is_refused_each_time(shape: tuple[int, ...]) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError):
            meta_results.call(ATEN.addmm_.default, (_meta(*shape), WIDE, WIDE), {})


def test_tensors_with_numbers_are_computed() -> None:
    two = torch.tensor([2.0])
    for _ in range(2):
        assert meta_results.call(ATEN.mul.Tensor, (two, two), {}).item() == 4.0
