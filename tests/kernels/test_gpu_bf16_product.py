"""The bf16 product with another one inside, on a Hopper GPU."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels import bf16_product as dispatch
from tunefork.kernels.bf16_product import bf16_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "sizes", "p"),
    [
        (16_384, 4096, (4096,), 16),
        (2048, 4096, (4096, 1024, 1024), 48),
        (1000, 4096, (14_336, 14_336), 32),
        (77, 144, (592,), 16),
        (1, 16, (16,), 8),
        (300, 272, (144, 80), 200),
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
    torch.manual_seed(0)
    parts, u, k = [_draw(m, size) for size in sizes], _draw(m, p), sum(sizes)
    b, v = (_draw(k, n), _draw(p, n)) if is_turned else (_draw(n, k), _draw(n, p))
    y = bf16_product(parts, b, u, v, is_turned=is_turned)
    a, b, u, v = torch.cat(parts, dim=1).double(), b.double(), u.double(), v.double()
    exact = a @ b + u @ v if is_turned else a @ b.t() + u @ v.t()
    assert y.shape == exact.shape and y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4 * exact.std()).all()


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
