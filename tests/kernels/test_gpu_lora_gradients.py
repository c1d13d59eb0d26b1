"""The Triton kernel that makes du and B's gradient from one reading of dy, on a GPU.

Truth is float64's. Products are summed in fp32 and rounded to bf16 once: a value is off by at most
2**-8 of itself, and by what tensor cores cut off of sums in which much cancels: in each of
thousands of additions up to 2**-23 of the largest. A tile left out would be off by a tenth of it.

The definition's products have no such bound. cuBLAS may cut what they sum over, here up to 16,384
tokens, into pieces, and PyTorch's default lets it round each piece's sum to bf16 (`torch.backends.
cuda.matmul.allow_bf16_reduced_precision_reduction`): where pieces cancel, what is left is off by
2**-8 of them, not of itself. Two pieces of 3,001 tokens put 4 % of the values (simulated) beyond
twice the bound above. So where the definition is to be taken, what is found has to be its bits.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tunefork.kernels import lora_gradients as dispatch
from tunefork.kernels.layout import Layout
from tunefork.kernels.lora_gradients import (
    LARGEST_RANK,
    LEAST_TOKENS,
    lora_gradients,
    lora_gradients_reference,
)
from tunefork.kernels.lora_group import lora_group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU",
    ),
]
SCALE = 0.7
Operands = tuple[list[Tensor], Tensor, list[Tensor]]


def _draw(tokens: int, sizes: Sequence[int], ranks: Sequence[int], first: int = 0) -> Operands:
    """dy as columns of one tensor from `first` on, u as the first columns of a wider one."""
    torch.manual_seed(0)
    wide = torch.randn(tokens, first + sum(sizes), device="cuda").bfloat16()
    read = torch.randn(tokens, sum(ranks) + 24, device="cuda").bfloat16()
    lora_b = [
        torch.randn(size, rank, device="cuda").bfloat16()
        for size, rank in zip(sizes, ranks, strict=True)
    ]
    dys = list(torch.split(wide[:, first:], list(sizes), dim=1))
    return dys, read[:, : sum(ranks)], lora_b


def _assert_exact(found: tuple[Tensor, list[Tensor]], operands: Operands) -> None:
    """Within one rounding to bf16 of float64's."""
    dys, u, lora_b = operands
    exact = [dy.double() for dy in dys], u.double(), [b.double() for b in lora_b]
    want_du, want_db = lora_gradients_reference(*exact, SCALE)
    for ours, truth in zip([found[0], *found[1]], [want_du, *want_db], strict=True):
        assert ours.shape == truth.shape and ours.dtype == torch.bfloat16
        cancelled = 1e-4 * truth.abs().max()
        assert bool(((ours.double() - truth).abs() <= 2**-8 * truth.abs() + cancelled).all())


def _assert_equal(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> None:
    """Bit for bit."""
    assert all(torch.equal(x, y) for x, y in zip([a[0], *a[1]], [b[0], *b[1]], strict=True))


def _not_asked(*_: Any) -> Any:
    raise AssertionError("this way was not to be taken")


@pytest.mark.parametrize("rank", [1, 8, 12, 16, 24, LARGEST_RANK])
def test_each_rank(rank: int) -> None:
    operands = _draw(LEAST_TOKENS, (1024, 576), (rank, rank))
    _assert_exact(lora_gradients(*operands, SCALE), operands)


@pytest.mark.parametrize(
    ("tokens", "sizes", "ranks", "first"),
    [
        (16384, (4096, 1024, 1024), (16, 16, 16), 0),  # q, k and v
        (16384, (14336, 14336), (16, 32), 0),
        (LEAST_TOKENS + 1, (4096,), (16,), 16),  # rows that do not follow each other
        (3001, (1040, 528, 16), (16, 8, 32), 0),  # blocks that are not full
        (3001, (1040, 528, 16), (16, 8, 32), 16),  # and columns of a wider tensor
    ],
)
def test_any_sizes_and_strides(
    tokens: int,
    sizes: tuple[int, ...],
    ranks: tuple[int, ...],
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operands = _draw(tokens, sizes, ranks, first)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "lora_gradients_reference", _not_asked)
        found = lora_gradients(*operands, SCALE)
    _assert_exact(found, operands)


@pytest.mark.parametrize(
    ("tokens", "sizes", "ranks", "first"),
    [
        (3001, (1000, 513, 7), (16, 8, 32), 0),  # rows are not aligned,
        (3001, (1024, 512), (16, 16), 8),  # in the wider tensor,
        (LEAST_TOKENS - 1, (1024, 512), (16, 16), 0),  # or few
        (0, (1024, 512), (16, 16), 0),
    ],
)
def test_what_is_not_worth_a_kernel_takes_the_definition(
    tokens: int,
    sizes: tuple[int, ...],
    ranks: tuple[int, ...],
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tunefork.kernels import lora_gradients_triton

    operands = _draw(tokens, sizes, ranks, first)
    monkeypatch.setattr(lora_gradients_triton, "launch", _not_asked)
    _assert_equal(lora_gradients(*operands, SCALE), lora_gradients_reference(*operands, SCALE))


@pytest.mark.parametrize(
    ("tokens", "sizes", "ranks", "first"),
    [
        (3001, (1000, 513, 7), (16, 8, 64), 0),
        (700, (1030, 1), (33, 16), 3),
        (1, (16, 1), (1, 16), 0),
    ],
)
def test_the_kernel_itself_takes_what_it_is_not_asked_for(
    tokens: int, sizes: tuple[int, ...], ranks: tuple[int, ...], first: int
) -> None:
    from tunefork.kernels.lora_gradients_triton import launch

    operands = _draw(tokens, sizes, ranks, first)
    du, *db = launch(*operands, SCALE)
    _assert_exact((du, db), operands)


def test_of_more_numbers_than_32_bits_count() -> None:
    dys, u, lora_b = _draw(2**17, (16384 + 512,), (16,))
    du, (db,) = lora_gradients(dys, u, lora_b, SCALE)
    dy, b = dys[0], lora_b[0]
    want = SCALE * (dy[-4096:].double() @ b.double())  # of all it would take 18 GB
    torch.testing.assert_close(du[-4096:].double(), want, rtol=2**-8, atol=0.05)
    want = SCALE * (dy[:, -512:].double().t() @ u.double())
    torch.testing.assert_close(db[-512:].double(), want, rtol=2**-8, atol=0.2)


def test_the_bits_are_the_same_each_time() -> None:
    operands = _draw(16384, (4096, 1024), (16, 32))
    found = lora_gradients(*operands, SCALE)
    for _ in range(5):
        _assert_equal(lora_gradients(*operands, SCALE), found)


def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    dys, u, lora_b = _draw(LEAST_TOKENS, (1024,), (16,))
    before_du, (before_db,) = lora_gradients(dys, u, lora_b, SCALE)
    dys[0][77, 33] = torch.nan
    du, (db,) = lora_gradients(dys, u, lora_b, SCALE)
    for after, before, at in ((du, before_du, 77), (db, before_db, 33)):
        others = torch.arange(len(after), device="cuda") != at
        assert bool(after[at].isnan().all()) and torch.equal(after[others], before[others])


def test_the_operator_is_one_to_the_compiler() -> None:
    for tokens in (100, LEAST_TOKENS):  # the definition, the kernel
        dys, u, lora_b = _draw(tokens, (256, 96), (16, 8), 16)
        torch.library.opcheck(torch.ops.tunefork.lora_gradients.default, (dys, u, lora_b, SCALE))


def test_compiled_once_it_serves_all_lengths() -> None:
    def gradients(dys: list[Tensor], u: Tensor, lora_b: list[Tensor]) -> Tensor:
        du, db = lora_gradients([dy * 2 for dy in dys], u, lora_b, SCALE)
        return torch.cat([du.flatten(), *(each.flatten() for each in db)])

    compiled = torch.compile(gradients, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (LEAST_TOKENS + 40, 96, 16384):
            dys, u, lora_b = _draw(tokens, (1024, 512), (16, 8))
            dys, u = [dy.contiguous() for dy in dys], u.contiguous()
            assert torch.equal(compiled(dys, u, lora_b), gradients(dys, u, lora_b))
    torch._dynamo.reset()


def test_captured_it_reads_what_is_there_at_each_replay() -> None:
    dys, u, lora_b = _draw(4096, (1024, 512), (16, 16))
    lora_gradients(dys, u, lora_b, SCALE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        du, db = lora_gradients(dys, u, lora_b, SCALE)
    for _ in range(3):
        for dy in dys:
            dy.normal_()
        u.normal_()
        graph.replay()
        _assert_equal((du, db), lora_gradients(dys, u, lora_b, SCALE))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_groups_gradients_are_those_of_the_definition(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layout, features = Layout("bf16", "bf16", (1024, 512, 512), (16, 0, 8), SCALE), 512
    x = torch.randn(2, LEAST_TOKENS, features, device="cuda").bfloat16().requires_grad_()
    lora_a = [torch.randn(rank, features, device="cuda") / 20 for rank in (16, 8)]
    lora_b = [torch.randn(o, rank, device="cuda") / 4 for o, rank in ((1024, 16), (512, 8))]
    inputs = [x, *(t.requires_grad_() for t in (*lora_a, *lora_b))]
    weights = [torch.randn(o, features, device="cuda").bfloat16() / 20 for o in layout.sizes]
    weight = torch.cat(weights)
    upstream = [torch.randn(2, LEAST_TOKENS, o, device="cuda").bfloat16() for o in layout.sizes]

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return lora_group(x, layout, (weight,), lora_a, lora_b)

    run = torch.compile(forward, fullgraph=True) if is_compiled else forward
    got = torch.autograd.grad(run(x), inputs, upstream)
    torch._dynamo.reset()
    monkeypatch.setattr("tunefork.kernels.lora_group.lora_gradients", lora_gradients_reference)
    want = torch.autograd.grad(forward(x), inputs, upstream)
    for ours, theirs in zip(got, want, strict=True):
        # Both round to bf16, in up to three places.
        assert float((ours - theirs).norm()) <= 3 * 2**-8 * float(theirs.norm())
