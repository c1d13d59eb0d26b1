"""The Triton kernels that make u and A's gradient beside SwiGLU, on a GPU.

Truth is float64's. Each value is computed in fp32 and rounded to bf16 once, products are of the
rounded h, and sums are off by what tensor cores cut off where much cancels (`test_gpu_lora_
gradients.py`). A tile left out would be off by a tenth and more. Rows' largest magnitudes are of
numbers that are rounded already, and exact.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunefork.kernels.gated import (
    LARGEST_RANK,
    gated_down,
    gated_down_reference,
    gated_gradients,
    gated_gradients_and_maxima,
    gated_gradients_reference,
)
from tunefork.kernels.gated_lora import gated_lora
from tunefork.kernels.layout import Layout
from tunefork.kernels.lora_group import lora_group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _draw(tokens: int, features: int, rank: int, first: int = 0, beside: int = 0) -> Operands:
    """gate, up, dh, du and A; the first three are columns of one tensor from `first` on, with
    `beside` others behind each."""
    torch.manual_seed(0)
    each = features + beside
    wide = torch.randn(tokens, first + 3 * each, device="cuda").bfloat16()
    gate, up, dh = (wide[:, first + at * each :][:, :features] for at in range(3))
    read = torch.randn(tokens, rank + beside, device="cuda").bfloat16()
    gate.mul_(2)
    a = torch.randn(rank, features, device="cuda").bfloat16()
    return gate, up, dh, read[:, :rank], a


def _fold(features: int) -> Tensor:
    return torch.linspace(0.5, 1.5, 2 * features, device="cuda")[None]


def _all(gate: Tensor, up: Tensor, dh: Tensor, du: Tensor, a: Tensor) -> list[Tensor]:
    """h, u, dgate, dup and dA, and the last three again with the rows' largest magnitudes."""
    with_maxima = gated_gradients_and_maxima(gate, up, dh.clone(), du, _fold(gate.shape[1]))
    return [*gated_down(gate, up, a), *gated_gradients(gate, up, dh.clone(), du), *with_maxima]


def _assert_near(found: Tensor, truth: Tensor, cancelled: float = 1e-4) -> None:
    """Within one rounding to bf16 of `truth`, and `cancelled` of its largest value."""
    assert found.shape == truth.shape and found.dtype == torch.bfloat16
    bound = 2**-8 * truth.abs() + cancelled * truth.abs().max()
    assert bool(((found.double() - truth).abs() <= bound).all())


def _assert_exact(operands: Operands) -> None:
    gate, up, dh, du, a = operands
    h, u, dgate, dup, da, *again, most = _all(*operands)
    assert all(torch.equal(x, y) for x, y in zip(again, (dgate, dup, da), strict=True))
    folded = torch.cat([dgate, dup], dim=1).float() * _fold(gate.shape[1])
    assert torch.equal(most, folded.abs().amax(1, keepdim=True))
    wide_gate, wide_up, wide_dh = gate.double(), up.double(), dh.double()
    _assert_near(h, F.silu(wide_gate) * wide_up, 1e-7)
    _assert_near(u, h.double() @ a.double().t())
    _assert_near(da, du.double().t() @ h.double())
    share = wide_gate.sigmoid()
    _assert_near(dup, wide_dh * wide_gate * share, 1e-7)
    _assert_near(dgate, wide_dh * wide_up * share * (1 + wide_gate * (1 - share)), 1e-6)


@pytest.mark.parametrize("rank", [1, 5, 8, 16, 17, 24, 32, 48, LARGEST_RANK])
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
        (512, 14_336, 16, 0, 0),
        (64, 48, 16, 0, 0),
    ],
)
def test_any_sizes_and_strides(
    tokens: int, features: int, rank: int, first: int, beside: int
) -> None:
    _assert_exact(_draw(tokens, features, rank, first, beside))


def test_operands_that_are_turned() -> None:
    gate, up, dh, du, a = _draw(256, 384, 16)
    turned = [x.t().contiguous().t() for x in (gate, up, dh, du, a)]
    _assert_exact((turned[0], turned[1], turned[2], turned[3], turned[4]))


def test_no_tokens() -> None:
    h, u, dgate, dup, *gradients = _all(*_draw(0, 384, 16))
    assert [tuple(x.shape) for x in (h, u, dgate, dup)] == [(0, 384), (0, 16), (0, 384), (0, 384)]
    for da in (gradients[0], gradients[3]):
        assert da.shape == (16, 384) and not da.any()
    assert gradients[4].shape == (0, 1)


def test_of_more_numbers_than_32_bits_count() -> None:
    tokens, features = 2**17, 16_384 + 512
    gate, up, dh, a = (
        torch.randn(rows, features, device="cuda", dtype=torch.bfloat16)
        for rows in (tokens, tokens, tokens, 16)
    )
    du = torch.randn(tokens, 16, device="cuda", dtype=torch.bfloat16)
    h, u = gated_down(gate, up, a)
    last = slice(tokens - 512, tokens)
    want_h, want_u = gated_down_reference(gate[last], up[last], a)
    torch.testing.assert_close(h[last], want_h, rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(u[last].float(), want_u.float(), rtol=2**-6, atol=2.0)
    wanted = gated_gradients_reference(gate[last], up[last], dh[last], du[last])
    dgate, dup, da = gated_gradients(gate, up, dh, du)
    for ours, theirs in zip((dgate, dup), wanted, strict=False):
        torch.testing.assert_close(ours[last], theirs, rtol=2**-6, atol=1e-4)
    want_da = du.t().double() @ h[:, -256:].double()
    torch.testing.assert_close(da[:, -256:].double(), want_da, rtol=2**-8, atol=0.2)


def test_the_bits_are_the_same_each_time() -> None:
    operands = _draw(16_384, 4096, 16)
    first = _all(*operands)
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, _all(*operands), strict=True))


def test_large_gates_give_numbers() -> None:
    gate, up, dh, du, a = _draw(64, 256, 16)
    gate[:, ::2], gate[:, 1::2] = 3e4, -3e4
    _assert_exact((gate, up, dh, du, a))


def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    gate, up, dh, du, a = _draw(300, 1024, 16)
    before = _all(gate, up, dh, du, a)
    gate[77, 33] = torch.nan
    after = _all(gate, up, dh, du, a)
    row = (torch.arange(300, device="cuda") == 77)[:, None]
    column = (torch.arange(1024, device="cuda") == 33)[None, :]
    gradients = [row & column, row & column, column]
    changed = [row & column, row, *gradients, *gradients, row]
    for x, y, is_changed in zip(before, after, changed, strict=True):
        is_changed = is_changed.expand_as(x)
        assert torch.equal(x[~is_changed], y[~is_changed])
        assert bool(y[is_changed].isnan().all())


def test_of_what_is_not_finite_the_largest_magnitude_is_nan_before_infinity() -> None:
    gate, up, dh, du, _ = _draw(64, 1024, 16)
    up[2, 900], dh[3, 900] = -torch.nan, torch.nan
    dh[1:3, 7] = -torch.inf
    *_, most = gated_gradients_and_maxima(gate, up, dh, du, _fold(1024))
    assert most[1] == torch.inf and bool(most[2:4].isnan().all())
    assert int(most.isfinite().sum()) == 61


def test_the_operators_are_such_to_the_compiler() -> None:
    gate, up, dh, du, a = _draw(100, 256, 8, 16, 16)
    torch.library.opcheck(torch.ops.tunefork.gated_down.default, (gate, up, a))
    operands = gate, up, dh.contiguous(), du
    torch.library.opcheck(torch.ops.tunefork.gated_gradients.default, operands)
    with_maxima = torch.ops.tunefork.gated_gradients_and_maxima.default
    torch.library.opcheck(with_maxima, (*operands, _fold(256)))
    with pytest.raises(ValueError, match="dh, which is written over, must be contiguous"):
        torch.ops.tunefork.gated_gradients(gate, up, dh, du)


@pytest.mark.parametrize("rank", [16, 64])
def test_dup_is_written_where_dh_was(rank: int) -> None:
    """Tiles on their way and straight into registers; rectangles of several tiles."""
    gate, up, dh, du, _ = _draw(16_384, 1152, rank)
    kept = dh.contiguous()
    _, dup, _ = gated_gradients(gate, up, dh, du)
    assert torch.equal(dh, kept) and dup.data_ptr() != dh.data_ptr()
    _, over, _ = gated_gradients(gate, up, kept, du)
    assert over.data_ptr() == kept.data_ptr() and torch.equal(over, dup)
    _assert_near(over, dh.double() * gate.double() * gate.double().sigmoid(), 1e-7)
    kept.copy_(dh)
    _, over, _, _ = gated_gradients_and_maxima(gate, up, kept, du, _fold(1152))
    assert over.data_ptr() == kept.data_ptr() and torch.equal(over, dup)


def test_compiled_once_they_serve_all_lengths() -> None:
    def run(gate: Tensor, up: Tensor, dh: Tensor, du: Tensor, a: Tensor) -> list[Tensor]:
        return _all(gate * 2, up + 1, dh * 0.5, du, a)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (296, 96, 4096):
            operands = tuple(x.contiguous() for x in _draw(tokens, 1024, 16))
            for ours, theirs in zip(compiled(*operands), run(*operands), strict=True):
                assert torch.equal(ours, theirs)
    torch._dynamo.reset()


def test_captured_they_read_what_is_there_at_each_replay() -> None:
    operands = _draw(4096, 1024, 16)
    _all(*operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _all(*operands)
    for _ in range(3):
        for operand in operands:
            operand.normal_()
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, _all(*operands), strict=True))


@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_backward_pass_makes_two_tensors(is_compiled: bool) -> None:
    """As large as gate: h's gradient, over which up's is written, and gate's. No copy."""
    layout = Layout("bf16", "bf16", (512,), (16,), 0.7)
    weight = torch.randn(512, 8192, device="cuda").bfloat16() / 20
    inputs: list[Any] = [torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2)]
    inputs += [torch.randn(16, 8192, device="cuda") / 20, torch.randn(512, 16, device="cuda") / 4]
    inputs = [x.requires_grad_() for x in inputs]

    def function(gate: Tensor, up: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return gated_lora(gate, up, layout, (weight,), a, b)

    run = torch.compile(function, fullgraph=True) if is_compiled else function
    for _ in range(2):  # the first compiles
        y = run(*inputs)
        upstream = torch.randn_like(y)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(y, inputs, upstream)
        more = torch.cuda.max_memory_allocated() - before
    torch._dynamo.reset()
    # Beside them shares of dA and narrow tensors.
    assert 2 * inputs[0].nbytes <= more < 2.4 * inputs[0].nbytes


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_layers_gradients_are_those_of_swiglu_and_a_group(is_compiled: bool) -> None:
    torch.manual_seed(0)
    layout = Layout("bf16", "bf16", (512,), (16,), 0.7)
    weight = torch.randn(512, 1536, device="cuda").bfloat16() / 20
    inputs: list[Any] = [torch.randn(2, 300, 1536, device="cuda").bfloat16() for _ in range(2)]
    inputs += [torch.randn(16, 1536, device="cuda") / 20, torch.randn(512, 16, device="cuda") / 4]
    inputs = [x.requires_grad_() for x in inputs]
    upstream = torch.randn(2, 300, 512, device="cuda").bfloat16()

    def ours(gate: Tensor, up: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return gated_lora(gate, up, layout, (weight,), a, b)

    def theirs(gate: Tensor, up: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = (F.silu(gate.float()) * up.float()).bfloat16()
        return lora_group(h, layout, (weight,), [a], [b])[0]

    run = torch.compile(ours, fullgraph=True) if is_compiled else ours
    y, want = run(*inputs), theirs(*inputs)
    got, wanted = (torch.autograd.grad(result, inputs, upstream) for result in (y, want))
    torch._dynamo.reset()
    for found, truth in zip([y, *got], [want, *wanted], strict=True):
        assert found.dtype == truth.dtype
        # Both round to bf16, in up to three places.
        assert float((found - truth).norm()) <= 3 * 2**-8 * float(truth.norm())
