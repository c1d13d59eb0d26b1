"""du and B's gradient: the definition, and when it is the kernel's operator that is asked."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels import lora_gradients as kernel
from tunefork.kernels.compiled import standing_for_gpu
from tunefork.kernels.lora_gradients import (
    LARGEST_RANK,
    LEAST_TOKENS,
    lora_gradients,
    lora_gradients_reference,
)

SCALE = 0.7


def _draw(
    sizes: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    torch.manual_seed(0)
    dys = [torch.randn(6, size).to(device, dtype) for size in sizes]
    lora_b = [
        torch.randn(size, rank).to(device, dtype) for size, rank in zip(sizes, ranks, strict=True)
    ]
    return dys, torch.randn(6, sum(ranks)).to(device, dtype), lora_b


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_those_of_the_deltas(dtype: torch.dtype) -> None:
    dys, u, lora_b = _draw((5, 3), (2, 4), dtype)
    inputs = [t.double().requires_grad_() for t in (u, *lora_b)]
    us = torch.split(inputs[0], [2, 4], dim=1)
    ys = [SCALE * (v @ b.t()) for v, b in zip(us, inputs[1:], strict=True)]
    want = torch.autograd.grad(ys, inputs, [dy.double() for dy in dys])
    du, db = lora_gradients(dys, u, lora_b, SCALE)
    for found, truth in zip([du, *db], want, strict=True):
        assert found.dtype == dtype and found.shape == truth.shape
        # Rounded once as a product, once as scaled.
        bound = 1e-12 if dtype == torch.float64 else 2**-7
        assert (found.double() - truth).norm() <= bound * truth.norm()


def test_one_layer_is_not_copied_into_a_group() -> None:
    (dy,), u, (b,) = _draw((5,), (2,), torch.bfloat16)
    du, (db,) = lora_gradients([dy], u, [b], SCALE)
    assert torch.equal(du, dy @ b * SCALE) and torch.equal(db, (dy.t() @ u) * SCALE)


@pytest.mark.parametrize(
    ("dtype", "rank", "is_kernel"),
    [
        (torch.bfloat16, LARGEST_RANK, True),
        (torch.bfloat16, LARGEST_RANK + 1, False),
        (torch.float32, 4, False),
    ],
)
def test_a_gpu_asks_the_operator_for_what_its_kernel_can(
    dtype: torch.dtype, rank: int, is_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def noting(*args: object) -> tuple[Tensor, list[Tensor]]:
        asked.append(args)
        return lora_gradients_reference(*args)  # type: ignore[arg-type]

    dys, u, lora_b = _draw((5, 3), (2, rank), dtype, "meta")
    monkeypatch.setattr(kernel, "lora_gradients_reference", noting)
    lora_gradients(dys, u, lora_b, SCALE)
    assert len(asked) == 1  # nothing stands for a GPU
    with standing_for_gpu(lambda *_: None):
        du, db = lora_gradients(dys, u, lora_b, SCALE)
    assert len(asked) == (1 if is_kernel else 2)
    want_du, want_db = lora_gradients_reference(dys, u, lora_b, SCALE)
    for found, want in zip([du, *db], [want_du, *want_db], strict=True):
        assert (found.shape, found.stride(), found.dtype) == (
            want.shape,
            want.stride(),
            want.dtype,
        )


@pytest.mark.parametrize(
    ("tokens", "columns", "stride", "capability", "pays"),
    [
        (LEAST_TOKENS, (8, 56), 64, (9, 0), True),
        (LEAST_TOKENS - 1, (8, 56), 64, (9, 0), False),
        (LEAST_TOKENS, (4, 52), 64, (9, 0), False),
        (LEAST_TOKENS, (8, 48), 64, (9, 0), False),
        (LEAST_TOKENS, (8, 56), 72, (9, 0), False),
        (LEAST_TOKENS, (8, 56), 64, (8, 0), False),
        (LEAST_TOKENS, (8, 56), 64, (10, 0), False),
    ],
)
def test_the_kernel_is_for_many_aligned_rows_on_a_hopper_gpu(
    tokens: int,
    columns: tuple[int, int],
    stride: int,
    capability: tuple[int, int],
    pays: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dy = torch.empty(tokens, stride, dtype=torch.bfloat16)[:, slice(*columns)]
    assert kernel.is_worth_a_kernel([dy]) == pays
    assert kernel.is_worth_a_kernel([torch.empty(tokens, 16, dtype=torch.bfloat16), dy]) == pays


def test_the_operators_shapes_serve_strided_operands() -> None:
    """What it tells a compiler is new and contiguous, however what it is given lies."""
    whole = torch.empty(6, 20, dtype=torch.bfloat16, device="meta")
    wide_b = torch.empty(4, 8, dtype=torch.bfloat16, device="meta")
    du, db = torch.ops.tunefork.lora_gradients([whole[:, 3:11]], whole[:, 1:5], [wide_b.t()], 1.0)
    assert du.shape == (6, 4) and du.is_contiguous()
    assert db.shape == (8, 4) and db.is_contiguous()
