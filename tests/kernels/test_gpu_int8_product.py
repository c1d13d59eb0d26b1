"""The product of int8 codes with a bf16 one inside, on a Hopper GPU, by both kernels."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels import int8_product as dispatch
from tunefork.kernels import narrow_product
from tunefork.kernels.cuda_source import CudaSourceError
from tunefork.kernels.int8_product import check_kernel, int8_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]
Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _operands(m: int, n: int, k: int, p: int, *, has_scale: bool = True) -> Operands:
    torch.manual_seed(m + n + k + p)
    a, b = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda") for rows in (m, n))
    scale_m = (torch.rand(m, 1, device="cuda") + 0.5) / (5000 * k**0.5)
    scale_n = torch.rand(1, n, device="cuda") + 0.5 if has_scale else None
    u, v = (torch.randn(rows, p, device="cuda").bfloat16() / p**0.25 for rows in (m, n))
    return a, b, scale_m, scale_n, u if p else None, v if p else None


def _exact(a: Tensor, b: Tensor, *rest: Tensor | None) -> Tensor:
    scale_m, scale_n, u, v = (None if t is None else t.double() for t in rest)
    assert scale_m is not None
    y = a.double() @ b.double().t() * scale_m
    y = y if scale_n is None else y * scale_n
    return y if u is None or v is None else y + u @ v.t()


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "k", "p"),
    [
        (16_384, 4096, 4096, 64),
        (2048, 28_672, 4096, 80),
        (1000, 4096, 28_672, 32),  # sums of up to 28
        (1000, 624, 4096, 0),
        (77, 144, 592, 16),  # tiles that are not full
        (1, 16, 16, 8),
        (256, 256, 128, 64),
        (300, 272, 144, 200),
        (130, 40 * 16, 96, 24),
    ],
)
def test_it_is_float64s_but_for_bf16s_rounding(
    m: int, n: int, k: int, p: int, has_scale: bool, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "columns_for", lambda *_: columns)
    given = _operands(m, n, k, p, has_scale=has_scale)
    y, exact = int8_product(*given), _exact(*given)
    assert y.shape == (m, n) and y.dtype == torch.bfloat16
    # Of one rounding, and of the narrow sums in fp32.
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.std()).all()


def test_codes_alone_are_summed_exactly() -> None:
    """No bit is lost before the scale: sums beyond 2**24 that end in an odd number."""
    a = torch.full((128, 28_672), 127, dtype=torch.int8, device="cuda")
    b = torch.full((256, 28_672), 127, dtype=torch.int8, device="cuda")
    b[:, 1:] *= torch.tensor([1, -1], dtype=torch.int8, device="cuda").repeat(14_336)[1:]
    b[::2, 5] = 3
    wanted = a.cpu().long()[:1] @ b.cpu().long().t()
    y = int8_product(a, b, torch.ones(128, 1, device="cuda"), None, None, None)
    assert torch.equal(y.cpu(), wanted.bfloat16().expand(128, -1))


def test_what_is_not_finite_stays_in_its_row() -> None:
    a, b, scale_m, scale_n, u, v = _operands(300, 512, 256, 16)
    assert u is not None
    before = int8_product(a, b, scale_m, scale_n, u, v)
    scale_m[7], u[40, 3], scale_m[299] = torch.nan, torch.inf, torch.inf
    after = int8_product(a, b, scale_m, scale_n, u, v)
    rows = [7, 40, 299]
    others = [at for at in range(300) if at not in rows]
    assert not after[rows].isfinite().any() and torch.equal(after[others], before[others])


def test_operands_that_are_not_contiguous_no_rows_and_no_columns() -> None:
    a, b, scale_m, scale_n, u, v = _operands(200, 320, 256, 32)
    assert scale_n is not None and u is not None and v is not None
    want = int8_product(a, b, scale_m, scale_n, u, v)
    turned = [t.t().contiguous().t() for t in (a, b, scale_m, scale_n, u, v)]
    assert torch.equal(int8_product(*turned), want)
    assert int8_product(a[:0], b, scale_m[:0], scale_n, u[:0], v).shape == (0, 320)
    assert int8_product(a, b[:0], scale_m, scale_n[:, :0], u, v[:0]).shape == (200, 0)


def test_the_operator_is_such_to_the_compiler() -> None:
    torch.library.opcheck(torch.ops.tunefork.int8_product.default, _operands(96, 128, 64, 16))


def test_captured_it_multiplies_what_is_there_at_each_replay() -> None:
    given = _operands(512, 1024, 256, 48)
    a, _, scale_m, *_ = given
    int8_product(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = int8_product(*given)
    for _ in range(3):
        a.random_(-127, 128)
        scale_m.uniform_(1e-6, 1e-5)
        graph.replay()
        assert torch.equal(captured, int8_product(*given))


def test_a_kernel_that_errs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    check_kernel(device)
    real = dispatch.int8_product_reference

    def wrong(*operands: Tensor) -> Tensor:
        return real(*operands) * 1.01

    monkeypatch.setattr(dispatch, "int8_product_reference", wrong)
    with pytest.raises(CudaSourceError, match="is wrong"):
        check_kernel(device)


@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "k", "p"),
    [(2048, 4096, 4096, 64), (1000, 624, 4096, 0), (77, 144, 592, 16), (1, 16, 16, 8)],
)
def test_the_kernel_of_other_gpus_is_as_exact(
    m: int, n: int, k: int, p: int, has_scale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "kernel", lambda *_: None)
    given = _operands(m, n, k, p, has_scale=has_scale)
    y, exact = int8_product(*given), _exact(*given)
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.std()).all()


def test_without_a_compiler_the_other_kernel_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise CudaSourceError("no NVRTC")

    monkeypatch.setattr(narrow_product, "CudaKernel", refused)
    narrow_product.kernel.cache_clear()
    check_kernel(torch.device("cuda", 0))
    assert "narrow_product.cu is not used" in caplog.text and "no NVRTC" in caplog.text
    narrow_product.kernel.cache_clear()
