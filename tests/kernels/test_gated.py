"""SwiGLU beside its narrow products: the definitions, and when the operators are asked."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunefork.kernels import gated as kernel
from tunefork.kernels.compiled import standing_for_gpu
from tunefork.kernels.gated import (
    LARGEST_RANK,
    gated_down,
    gated_gradients,
    gated_gradients_and_maxima,
)


def _draw(rank: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """gate, up, dh, du and A of 6 tokens and 10 features."""
    torch.manual_seed(0)
    shapes = [(6, 10)] * 3 + [(6, rank), (rank, 10)]
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_autograd(dtype: torch.dtype) -> None:
    gate, up, dh, du, a = _draw(3, dtype)
    inputs = [x.double().requires_grad_() for x in (gate, up, a)]
    h = F.silu(inputs[0]) * inputs[1]
    u = h @ inputs[2].t()
    [da] = torch.autograd.grad(u, inputs[2:], du.double(), retain_graph=True)
    dgate, dup = torch.autograd.grad(h, inputs[:2], dh.double())
    found = [*gated_down(gate, up, a), *gated_gradients(gate, up, dh, du)]
    # Products are made of an h that is rounded.
    bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    for ours, truth in zip(found, [h, u, dgate, dup, da], strict=True):
        assert ours.dtype == dtype and ours.shape == truth.shape
        assert (ours.double() - truth).norm() <= bound * truth.norm()


def test_h_is_rounded_once_and_products_are_made_of_that() -> None:
    gate, up, dh, du, a = _draw(3, torch.bfloat16)
    exact = F.silu(gate.double()) * up.double()
    h, u = gated_down(gate, up, a)
    assert bool(((h.double() - exact).abs() <= 2**-8 * exact.abs()).all())
    assert torch.equal(u, h @ a.t())
    assert torch.equal(gated_gradients(gate, up, dh, du)[2], du.t() @ h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maxima_are_of_the_gradients_that_it_gives(dtype: torch.dtype) -> None:
    gate, up, dh, du, _ = _draw(3, dtype)
    fold = torch.rand(1, 20)
    *found, most = gated_gradients_and_maxima(gate, up, dh, du, fold)
    plain = gated_gradients(gate, up, dh, du)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))
    wide = torch.cat(found[:2], dim=1).float() * fold
    wanted = torch.tensor([[max(abs(x) for x in row)] for row in wide.tolist()])
    assert most.dtype == torch.float32 and torch.equal(most, wanted)


def test_maxima_are_not_finite_where_a_gradient_is_not() -> None:
    gate, up, dh, du, _ = _draw(3, torch.bfloat16)
    dh[1, 4], dh[2, 4], up[2, 7], dh[3, 0] = torch.inf, -torch.inf, torch.nan, torch.nan
    *_, most = gated_gradients_and_maxima(gate, up, dh, du, torch.rand(1, 20))
    assert most[1] == torch.inf and bool(most[2:4].isnan().all())
    assert bool(most[[0, 4, 5]].isfinite().all())


def test_gates_that_are_very_negative_or_positive_give_numbers() -> None:
    gate = torch.tensor([[-300.0, -90.0, 0.0, 90.0, 300.0]])
    up, one = torch.full((1, 5), 2.0), torch.ones(1, 5)
    h, _ = gated_down(gate, up, one)
    torch.testing.assert_close(h, torch.tensor([[0.0, 0.0, 0.0, 180.0, 600.0]]))
    dgate, dup, _ = gated_gradients(gate, up, one, torch.ones(1, 1))
    torch.testing.assert_close(dgate, torch.tensor([[0.0, 0.0, 1.0, 2.0, 2.0]]))
    torch.testing.assert_close(dup, torch.tensor([[0.0, 0.0, 0.0, 90.0, 300.0]]))


@pytest.mark.parametrize(
    ("dtype", "rank", "is_kernel"),
    [
        (torch.bfloat16, LARGEST_RANK, True),
        (torch.bfloat16, LARGEST_RANK + 1, False),
        (torch.bfloat16, 0, False),
        (torch.float32, 4, False),
    ],
)
def test_a_gpu_asks_the_operators_for_what_their_kernels_can(
    dtype: torch.dtype, rank: int, is_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    names = "gated_down", "gated_gradients", "gated_gradients_and_maxima"
    for name in (f"{name}_reference" for name in names):

        def noting(*args: Tensor, own: object = getattr(kernel, name)) -> object:
            asked.append(args)
            return own(*args)  # type: ignore[operator]

        monkeypatch.setattr(kernel, name, noting)
    gate, up, dh, du, a = _draw(rank, dtype, "meta")
    fold = torch.empty(1, 20, device="meta")

    def all_three() -> list[Tensor]:
        with_maxima = gated_gradients_and_maxima(gate, up, dh, du, fold)
        return [*gated_down(gate, up, a), *gated_gradients(gate, up, dh, du), *with_maxima]

    want = all_three()
    assert len(asked) == 4  # nothing stands for a GPU; one definition asks another
    with standing_for_gpu(lambda *_: None):
        found = all_three()
    assert len(asked) == (4 if is_kernel else 8)
    for ours, theirs in zip(found, want, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.is_contiguous()


def test_the_operators_shapes_serve_strided_operands() -> None:
    """What they tell a compiler is new and contiguous, however what they are given lies."""
    wide = torch.empty(6, 40, dtype=torch.bfloat16, device="meta")
    gate, up, dh = (wide[:, at : at + 10] for at in (0, 10, 25))
    a, du = wide.t()[:10, :3].t(), wide[:, 5:8]
    fold = torch.empty(20, 1, device="meta").t()
    found = [
        *torch.ops.tunefork.gated_down(gate, up, a),
        *torch.ops.tunefork.gated_gradients(gate, up, dh, du),
        *torch.ops.tunefork.gated_gradients_and_maxima(gate, up, dh, du, fold),
    ]
    gradients = [(6, 10), (3, 10)]
    wanted = [(6, 10), (6, 3), *gradients, *gradients, (6, 1)]
    assert [tuple(x.shape) for x in found] == wanted and found[-1].dtype == torch.float32
    assert all(x.is_contiguous() for x in found)


@pytest.mark.parametrize("lies", ["contiguous", "in columns", "turned"])
def test_on_a_gpu_dup_is_written_where_dh_was(lies: str) -> None:
    """Of one that is not contiguous a copy is, where the operators would find none to write."""
    gate, up, dh, du, _ = _draw(3, torch.bfloat16, "meta")
    if lies != "contiguous":
        dh = torch.empty(10, 12, dtype=torch.bfloat16, device="meta")
        dh = dh[:, :6].t() if lies == "turned" else dh[:6, :10]
    fold, versions = torch.empty(1, 20, device="meta"), [dh._version]
    with standing_for_gpu(lambda *_: None):
        dup = [gated_gradients(gate, up, dh, du)[1]]
        versions.append(dh._version)
        dup.append(gated_gradients_and_maxima(gate, up, dh, du, fold)[1])
        versions.append(dh._version)
    is_same = lies == "contiguous"
    assert [x is dh for x in dup] == [is_same, is_same]
    assert versions == ([0, 1, 2] if is_same else [0, 0, 0])
    assert all(x.is_contiguous() and x.shape == (6, 10) for x in dup)


def test_the_definition_writes_over_nothing() -> None:
    gate, up, dh, du, _ = _draw(3, torch.float32)
    before = dh.clone()
    gated_gradients(gate, up, dh, du)
    gated_gradients_and_maxima(gate, up, dh, du, torch.rand(1, 20))
    assert torch.equal(dh, before)
