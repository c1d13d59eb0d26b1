"""The bf16 product with another one inside, on a Hopper GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tunefork.kernels import bf16_product as dispatch
from tunefork.kernels.bf16_product import bf16_product, check_kernel
from tunefork.kernels.cuda_source import CudaSourceError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def _operands(
    m: int, n: int, sizes: tuple[int, ...], p: int, is_turned: bool
) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor | None]:
    """Parts, b, u and v; without the latter where P is 0."""
    parts, k = [_draw(m, size) for size in sizes], sum(sizes)
    b = _draw(k, n) if is_turned else _draw(n, k)
    if not p:
        return parts, b, None, None
    return parts, b, _draw(m, p), _draw(p, n) if is_turned else _draw(n, p)


def _check(
    parts: list[Tensor], b: Tensor, u: Tensor | None, v: Tensor | None, is_turned: bool
) -> None:
    """That y is float64's but for one rounding."""
    y = bf16_product(parts, b, u, v, is_turned=is_turned)
    a, b = torch.cat(parts, dim=1).double(), b.double()
    exact = a @ b if is_turned else a @ b.t()
    if u is not None and v is not None:
        exact += u.double() @ (v if is_turned else v.t()).double()
    assert y.shape == exact.shape and y.dtype == torch.bfloat16
    # Tensor cores cut sums off where others round: that adds up with K.
    slack = (1e-4 + 3e-8 * a.shape[1]) * exact.std()
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + slack).all()


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "sizes", "p"),
    [
        (16_384, 4096, (4096,), 16),
        (2048, 4096, (4096, 1024, 1024), 48),
        (2048, 4096, (4096, 1024, 1024), 0),
        (1000, 4096, (14_336, 14_336), 32),
        (77, 144, (592,), 16),
        (1, 16, (16,), 8),
        (300, 272, (144, 80), 200),
        (300, 272, (144, 80), 0),
        (130, 640, (64, 128, 64, 64), 24),
    ],
)
def test_it_is_float64s_but_for_one_rounding(
    m: int,
    n: int,
    sizes: tuple[int, ...],
    p: int,
    is_turned: bool,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_LEAST_ROWS", 1)
    monkeypatch.setattr(dispatch, "columns_for", lambda *_: columns)
    monkeypatch.setattr(dispatch, "_by_cublas", None)  # not where there is no kernel either
    torch.manual_seed(0)
    _check(*_operands(m, n, sizes, p, is_turned), is_turned)


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "sizes", "p"),
    [(2048, 1003, (64,), 8), (2048, 64, (100,), 8), (1500, 64, (100, 36), 8), (7, 1003, (36,), 8)],
)
def test_sizes_that_are_no_multiples_of_8(
    m: int, n: int, sizes: tuple[int, ...], p: int, is_turned: bool
) -> None:
    torch.manual_seed(0)
    _check(*_operands(m, n, sizes, p, is_turned), is_turned)


@pytest.mark.parametrize("is_turned", [False, True])
def test_what_is_beyond_an_edge_is_not_read(is_turned: bool) -> None:
    """The rest of wider and longer matrices holds NaN: behind K, P, N and M, and in no tile."""
    m, n, k, p = 1032, 272, 200, 24
    shapes = ((m, k), (k, n) if is_turned else (n, k), (m, p), (p, n) if is_turned else (n, p))
    given = [_draw(*shape) for shape in shapes]
    rooms = [torch.full((x + 264, y + 264), torch.nan, device="cuda").bfloat16() for x, y in shapes]
    views = [room[:x, :y] for room, (x, y) in zip(rooms, shapes, strict=True)]
    for view, matrix in zip(views, given, strict=True):
        view.copy_(matrix)
    y = bf16_product([views[0]], *views[1:], is_turned=is_turned)
    assert torch.equal(y, bf16_product([given[0]], *given[1:], is_turned=is_turned))
    assert y.isfinite().all()


def test_an_expanded_row_is_copied_first() -> None:
    b, u, v = _draw(256, 512), _draw(2048, 16), _draw(16, 512)
    a = _draw(1, 256).expand(2048, 256)
    by_kernel = bf16_product([a], b, u, v, is_turned=True)
    assert torch.equal(by_kernel, bf16_product([a.contiguous()], b, u, v, is_turned=True))


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "sizes", "p"),
    [
        (4096, 4096, (4096, 1024, 1024), 48),
        (2600, 272, (592,), 24),
        (2600, 272, (144, 80), 0),
        (77, 144, (592,), 16),
        (77, 144, (592,), 0),
    ],
)
def test_without_the_kernel_it_is_rounded_once_too(
    m: int,
    n: int,
    sizes: tuple[int, ...],
    p: int,
    is_turned: bool,
    copies: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_takes", lambda _: False)
    monkeypatch.setattr(dispatch, "_copying_is_less", lambda *_: copies)
    monkeypatch.setattr(dispatch, "_AT_A_TIME", 1)
    torch.manual_seed(0)
    _check(*_operands(m, n, sizes, p, is_turned), is_turned)


def test_a_kernel_that_errs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    check_kernel(device)
    real = dispatch.bf16_product_reference

    def wrong(*operands: Any, **named: Any) -> Tensor:
        return real(*operands, **named) * 1.01

    monkeypatch.setattr(dispatch, "bf16_product_reference", wrong)
    with pytest.raises(CudaSourceError, match="is wrong"):
        check_kernel(device)


def test_parts_of_wider_matrices_and_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_LEAST_ROWS", 1)
    wide = _draw(512, 3 * 256 + 64)
    parts = [wide[:, at * 256 : at * 256 + 256] for at in range(3)]
    b, u, v = _draw(768, 320), _draw(512, 64)[:, :16], _draw(16, 320)
    want = bf16_product([part.contiguous() for part in parts], b, u.contiguous(), v, is_turned=True)
    assert torch.equal(bf16_product(parts, b, u, v, is_turned=True), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bf16_product(parts, b, u, v, is_turned=True)
    wide.normal_()
    graph.replay()
    assert torch.equal(captured, bf16_product(parts, b, u, v, is_turned=True))
