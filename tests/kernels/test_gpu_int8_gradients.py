"""The Triton kernels that make codes, du and B's gradient from one reading of dy, on a GPU.

Codes are the nearest to float64's quotients but where these lie next to the middle of two: there a
multiplication and an addition may be rounded once or twice, of numbers up to 127. du and B's
gradient are bound as in `test_gpu_lora_gradients.py`.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_int8_gradients import SCALE, Operands, operands
from tunefork.kernels import int8_gradients as dispatch
from tunefork.kernels.int8_gradients import gradient_codes
from tunefork.kernels.int8_range import LARGEST
from tunefork.kernels.int8_rows import scale_of
from tunefork.kernels.lora_gradients import LEAST_TOKENS, lora_gradients_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU",
    ),
]
Found = tuple[Tensor, Tensor, Tensor, list[Tensor]]
CASES = [
    (16_384, (14_336, 14_336), (16, 16), 0),  # gate and up
    (16_384, (4096, 1024, 1024), (16, 16, 16), 0),  # q, k and v
    (16_384, (4096,), (32,), 0),
    (300, (4096, 1024, 1024), (4, 16, 32), 16),  # columns of a wider tensor
    (LEAST_TOKENS, (1040, 528, 16), (1, 24, 32), 16),  # blocks that are not full
    (3001, (1040,), (4,), 0),
]


def _not_asked(*_: Any) -> Any:
    raise AssertionError("this way was not to be taken")


def _assert_codes(found: Found, given: Operands) -> None:
    codes, scale, _, _ = found
    assert codes.dtype == torch.int8 and codes.shape == (len(scale), given.fold.shape[1])
    assert torch.equal(scale, scale_of(given.most))
    exact = torch.cat(given.dys, dim=1).float() * given.fold  # as `most` is of
    exact = exact.double() / scale.double()
    assert bool(((codes.double() - exact).abs() <= 0.5 + 1e-4).all())
    has_numbers = given.most[:, 0] > 0
    assert bool((codes.int().abs().amax(1) == LARGEST * has_numbers).all())


def _assert_exact(found: Found, given: Operands) -> None:
    """Within one rounding to bf16 of float64's."""
    exact = [dy.double() for dy in given.dys], given.u.double(), [b.double() for b in given.lora_b]
    want_du, want_db = lora_gradients_reference(*exact, given.lora_scale)
    for ours, truth in zip([found[2], *found[3]], [want_du, *want_db], strict=True):
        assert ours.shape == truth.shape and ours.dtype == torch.bfloat16
        cancelled = 1e-4 * truth.abs().max()
        assert bool(((ours.double() - truth).abs() <= 2**-8 * truth.abs() + cancelled).all())


def _assert_equal(a: Found, b: Found) -> None:
    """Bit for bit."""
    for x, y in zip([*a[:3], *a[3]], [*b[:3], *b[3]], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("tokens", "sizes", "ranks", "first"), CASES)
def test_the_kernel_is_the_definition(
    tokens: int,
    sizes: Sequence[int],
    ranks: Sequence[int],
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = operands(tokens, sizes, ranks, first=first, device="cuda")
    for dy in given.dys:
        dy[1] = 0
    given.dys[-1][2] *= 1e4
    given.dys[0][3, 5] = 3e3
    given = given.remeasured()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "lora_gradients_reference", _not_asked)
        found = gradient_codes(*given)
        _assert_equal(found, gradient_codes(*given))
    _assert_codes(found, given)
    _assert_exact(found, given)


@pytest.mark.parametrize("tiling", [(64, 256, 4, 3, 8), (64, 512, 8, 3, 8), (128, 256, 8, 3, 16)])
@pytest.mark.parametrize(("tokens", "sizes", "ranks", "first"), CASES[1:4])
def test_so_it_is_with_other_tilings(
    tokens: int,
    sizes: Sequence[int],
    ranks: Sequence[int],
    first: int,
    tiling: tuple[int, int, int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tunefork.kernels import int8_gradients_triton as triton_code
    from tunefork.kernels.lora_gradients_triton import Blocks

    rows, columns, warps, stages, at_once = tiling
    blocks = Blocks(rows=rows, columns=columns, warps=warps, stages=stages)
    cut = triton_code.Tiling(blocks, at_once)
    monkeypatch.setattr(triton_code, "_TILINGS", {16: cut, 32: cut})
    given = operands(tokens, sizes, ranks, first=first, device="cuda")
    found = gradient_codes(*given)
    _assert_codes(found, given)
    _assert_exact(found, given)


@pytest.mark.parametrize(
    ("tokens", "sizes", "ranks", "first"),
    [
        (300, (1000, 513, 7), (16, 8, 32), 0),  # rows are not aligned,
        (300, (1024, 512), (16, 16), 8),  # in the wider tensor,
        (LEAST_TOKENS - 1, (1024, 512), (16, 16), 0),  # or few,
        (300, (1024, 512), (16, 64), 0),  # or a rank is large
        (0, (1024, 512), (16, 16), 0),
    ],
)
def test_what_is_not_worth_a_kernel_takes_two_products(
    tokens: int,
    sizes: Sequence[int],
    ranks: Sequence[int],
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tunefork.kernels import int8_gradients_triton as triton_code

    given = operands(tokens, sizes, ranks, first=first, device="cuda")
    monkeypatch.setattr(triton_code, "launch", _not_asked)
    found = gradient_codes(*given)
    _assert_codes(found, given)
    want_du, want_db = lora_gradients_reference(*given[:4])
    assert torch.equal(found[2], want_du)
    assert all(torch.equal(a, b) for a, b in zip(found[3], want_db, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen_in_its_row_and_column(value: float) -> None:
    given = operands(LEAST_TOKENS, (1024, 512), (16, 8), device="cuda")
    before = gradient_codes(*given)
    given.dys[0][77, 33] = value
    codes, scale, du, db = gradient_codes(*given.remeasured())
    rows = torch.arange(LEAST_TOKENS, device="cuda") != 77
    columns = torch.arange(1024, device="cuda") != 33
    assert not bool(scale[77].isfinite().any() | du[77, :16].isfinite().any())
    for ours, theirs in zip((codes, scale, du), before[:3], strict=True):
        assert torch.equal(ours[rows], theirs[rows])
    assert not db[0][33].isfinite().any() and torch.equal(db[1], before[3][1])
    assert torch.equal(db[0][columns], before[3][0][columns])


def test_of_more_numbers_than_32_bits_count() -> None:
    given = operands(2**17, (16384 + 512,), (16,), device="cuda")
    codes, scale, du, _ = gradient_codes(*given)
    last = slice(2**17 - 4096, None)
    few = given._replace(dys=[given.dys[0][last]], u=given.u[last], most=given.most[last])
    _assert_codes((codes[last], scale[last], du[last], []), few)


def test_the_operator_is_one_to_the_compiler() -> None:
    for tokens in (100, LEAST_TOKENS):  # the definition's products, the kernel
        given = operands(tokens, (256, 96), (16, 8), first=16, device="cuda")
        torch.library.opcheck(torch.ops.tunefork.int8_gradient_codes.default, tuple(given))


def test_compiled_once_it_serves_all_lengths() -> None:
    def run(
        dys: list[Tensor], u: Tensor, lora_b: list[Tensor], fold: Tensor, most: Tensor
    ) -> tuple[Tensor, ...]:
        doubled = [dy * 2 for dy in dys]
        codes, scale, du, db = gradient_codes(doubled, u, lora_b, SCALE, fold, most * 2)
        return codes, scale, du, *db

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (LEAST_TOKENS + 40, 96, 16384):
            given = operands(tokens, (1024, 512), (16, 8), device="cuda")
            dys = [dy.contiguous() for dy in given.dys]
            inputs = dys, given.u.contiguous(), given.lora_b, given.fold, given.most
            for a, b in zip(compiled(*inputs), run(*inputs), strict=True):
                assert torch.equal(a, b)
    torch._dynamo.reset()


def test_captured_it_reads_what_is_there_at_each_replay() -> None:
    given = operands(4096, (1024, 512), (16, 16), device="cuda")
    gradient_codes(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradient_codes(*given)
    for _ in range(3):
        for dy in given.dys:
            dy.normal_()
        given.most.copy_(given.remeasured().most)
        graph.replay()
        _assert_equal(found, gradient_codes(*given))
