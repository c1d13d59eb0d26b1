"""Rows' largest magnitudes beside SwiGLU's gradients, and an MLP in int8 as one function, on a GPU.

The magnitudes are of numbers that are rounded already, so they are exact.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_int8_gated import STORAGES, gated, of_groups, operands
from tunefork.kernels.gated import (
    LARGEST_RANK,
    gated_gradients,
    gated_gradients_and_maxima,
    swiglu,
)
from tunefork.kernels.int8_weight import set_apart
from tunefork.kernels.layout import Storage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _draw(tokens: int, features: int, rank: int, first: int = 0, beside: int = 0) -> Operands:
    """gate, up, dh, du and fold; the first three are columns of one tensor from `first` on, with
    `beside` others behind each."""
    torch.manual_seed(0)
    each = features + beside
    wide = torch.randn(tokens, first + 3 * each, device="cuda").bfloat16()
    gate, up, dh = (wide[:, first + at * each :][:, :features] for at in range(3))
    du = torch.randn(tokens, rank + beside, device="cuda").bfloat16()[:, :rank]
    fold = torch.rand(1, 2 * features, device="cuda") + 0.5
    return gate, up, dh, du, fold


def _assert_exact(operands: Operands) -> None:
    gate, up, dh, du, fold = operands
    *found, most = gated_gradients_and_maxima(gate, up, dh.clone(), du, fold)
    plain = gated_gradients(gate, up, dh.clone(), du)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))
    wide = torch.cat(found[:2], dim=1).float() * fold
    assert most.dtype == torch.float32 and torch.equal(most, wide.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("rank", [1, 8, 16, 17, 32, LARGEST_RANK])
def test_each_rank(rank: int) -> None:
    _assert_exact(_draw(700, 1152, rank))


@pytest.mark.parametrize(
    ("tokens", "features", "rank", "first", "beside"),
    [
        (16_384, 14_336, 16, 0, 0),
        (4096, 14_336, 64, 0, 64),
        (3001, 1040, 16, 16, 8),  # blocks that are not full, columns of a wider tensor
        (129, 200, 12, 3, 1),  # rows that are not aligned
        (65, 7, 4, 0, 0),
        (1, 14_336, 16, 0, 0),
        (64, 48, 16, 0, 0),
    ],
)
def test_any_sizes_and_strides(
    tokens: int, features: int, rank: int, first: int, beside: int
) -> None:
    _assert_exact(_draw(tokens, features, rank, first, beside))


def test_operands_that_are_turned_and_no_tokens() -> None:
    gate, up, dh, du, fold = (x.t().contiguous().t() for x in _draw(256, 384, 16))
    _assert_exact((gate, up, dh, du, fold))
    *_, da, most = gated_gradients_and_maxima(*_draw(0, 384, 16))
    assert most.shape == (0, 1) and da.shape == (16, 384) and not da.any()


def test_what_is_not_finite_or_too_large_stays_in_its_row() -> None:
    gate, up, dh, du, fold = _draw(300, 1024, 16)
    *_, before = gated_gradients_and_maxima(gate, up, dh.clone(), du, fold)
    gate[77, 33], dh[5, 1000] = torch.nan, 3e38
    *_, after = gated_gradients_and_maxima(gate, up, dh, du, fold)
    assert after[77].isnan() and after[5].isinf()
    others = [at for at in range(300) if at not in (5, 77)]
    assert torch.equal(after[others], before[others])


def test_the_operator_is_such_to_the_compiler() -> None:
    operator = torch.ops.tunefork.gated_gradients_and_maxima.default
    gate, up, dh, du, fold = _draw(100, 256, 8, 16, 16)
    torch.library.opcheck(operator, (gate, up, dh.contiguous(), du, fold))
    with pytest.raises(ValueError, match="dh, which is written over, must be contiguous"):
        operator(gate, up, dh, du, fold)


@pytest.mark.parametrize("rank", [16, 64])
def test_dup_is_written_where_dh_was(rank: int) -> None:
    gate, up, dh, du, fold = _draw(16_384, 1152, rank)
    kept = dh.contiguous()
    want = gated_gradients_and_maxima(gate, up, dh, du, fold)
    found = gated_gradients_and_maxima(gate, up, kept, du, fold)
    assert found[1].data_ptr() == kept.data_ptr() and want[1].data_ptr() != dh.data_ptr()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, want, strict=True))


def test_captured_it_gives_the_same_bits_of_what_is_there_at_each_replay() -> None:
    gate, up, dh, du, fold = operands = _draw(4096, 1024, 16)

    def run() -> tuple[Tensor, ...]:
        return gated_gradients_and_maxima(gate, up, dh.clone(), du, fold)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(5):
        for operand in operands:
            operand.normal_()
        graph.replay()
        again = run()
        assert all(torch.equal(x, y) for x, y in zip(captured, again, strict=True))


@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("tokens", [60, 2048])
def test_an_mlp_is_that_of_the_groups(storage: Storage, is_compiled: bool, tokens: int) -> None:
    ranks = (16, 16, 16)
    groups, inputs = operands(storage, tokens, ranks, sizes=(256, 640), device="cuda")
    pair, pair_weights, last, last_weights = groups
    x = inputs[0].detach().flatten(0, 1)
    x[:, :8] *= 20  # a few directions to be multiplied apart, of h too
    set_apart(x, pair_weights, pair)
    gate, up = (x.float() @ torch.randn(256, 640, device="cuda") / 16 for _ in range(2))
    set_apart(swiglu(gate.bfloat16(), up.bfloat16()), last_weights, last)
    run: Any = torch.compile(gated, fullgraph=True) if is_compiled else gated
    y, want = run(groups, *inputs), of_groups(groups, *inputs)
    upstream = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(result, inputs, upstream) for result in (y, want))
    torch._dynamo.reset()
    assert _error(y, want) <= 2**-6
    # Roundings to bf16, and codes that these move.
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert _error(ours, theirs) <= 2**-5


def _error(found: Tensor, truth: Tensor) -> float:
    found, truth = found.detach().float(), truth.detach().float()
    return float((found - truth).norm() / truth.norm())
