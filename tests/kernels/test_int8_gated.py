"""A whole MLP with int8 products against SwiGLU between the two groups that it stands in for."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunefork.kernels.gated import LARGEST_RANK, swiglu
from tunefork.kernels.int8 import int8_lora
from tunefork.kernels.int8_gated import int8_gated, takes
from tunefork.kernels.int8_weight import dense, int8_weights, set_apart
from tunefork.kernels.layout import Layout, Storage
from tunefork.kernels.quantized import nf4_tensors, quantize_nf4

Operands = tuple[Layout, tuple[Tensor, ...], Layout, tuple[Tensor, ...]]
STORAGES: list[Storage] = ["int8", "nf4"]
D, E = 64, 96


def _weights(layout: Layout, features_in: int, device: str) -> tuple[Tensor, ...]:
    drawn = [torch.randn(o, features_in).div(features_in**0.5).bfloat16() for o in layout.sizes]
    drawn = [weight.to(device) for weight in drawn]
    if layout.storage == "nf4":
        drawn = [part for weight in drawn for part in nf4_tensors(*quantize_nf4(weight))]
    return int8_weights(drawn, layout, features_in)


def operands(
    storage: Storage,
    tokens: int = 40,
    ranks: tuple[int, int, int] = (4, 4, 6),
    sizes: tuple[int, int] = (D, E),
    device: str = "cpu",
) -> tuple[Operands, list[Tensor]]:
    """The two groups; x, then A and B of gate, up and down."""
    torch.manual_seed(0)
    d, e = sizes
    pair = Layout(storage, "int8", (e, e), ranks[:2], 2.0)
    last = Layout(storage, "int8", (d,), ranks[2:], 0.5)
    groups = (pair, _weights(pair, d, device), last, _weights(last, e, device))
    inputs: list[Tensor] = [torch.randn(2, tokens // 2, d).bfloat16()]
    for size_in, size_out, rank in zip((d, d, e), (e, e, d), ranks, strict=True):
        inputs += [torch.randn(rank, size_in) / size_in**0.5, torch.randn(size_out, rank) / 20]
    return groups, [x.to(device).requires_grad_() for x in inputs]


def gated(groups: Operands, x: Tensor, *trained: Tensor) -> Tensor:
    pair, pair_weights, last, last_weights = groups
    gate_a, gate_b, up_a, up_b, a, b = trained
    lora_a, lora_b = [gate_a, up_a], [gate_b, up_b]
    return int8_gated(x, pair, pair_weights, lora_a, lora_b, last, last_weights, a, b)


def of_groups(groups: Operands, x: Tensor, *trained: Tensor) -> Tensor:
    pair, pair_weights, last, last_weights = groups
    gate_a, gate_b, up_a, up_b, a, b = trained
    gate, up = int8_lora(x, pair, pair_weights, [gate_a, up_a], [gate_b, up_b])
    return int8_lora(swiglu(gate, up), last, last_weights, [a], [b])[0]


def _exact(groups: Operands, x: Tensor, *trained: Tensor) -> Tensor:
    """In float64."""
    pair, pair_weights, last, last_weights = groups
    gate_a, gate_b, up_a, up_b, a, b = (t.double() for t in trained)
    own = [dense(pair, pair_weights, D, torch.float32, at, at + 1).double() for at in (0, 1)]
    gate = x.double() @ (own[0] + pair.scale * gate_b @ gate_a).t()
    up = x.double() @ (own[1] + pair.scale * up_b @ up_a).t()
    down = dense(last, last_weights, E, torch.float32, 0, 1).double() + last.scale * b @ a
    return (F.silu(gate) * up) @ down.t()


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def _gradients(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(y, inputs, upstream.to(y.dtype))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("has_directions", [False, True])
@pytest.mark.parametrize("ranks", [(4, 4, 6), (3, 9, 1), (16, 16, 16)])
def test_equals_the_groups(
    storage: Storage, has_directions: bool, ranks: tuple[int, int, int]
) -> None:
    groups, inputs = operands(storage, ranks=ranks)
    pair, pair_weights, last, last_weights = groups
    assert takes(pair, last)
    if has_directions:
        x, *trained = inputs
        gate, up = int8_lora(x, pair, pair_weights, trained[::2][:2], trained[1::2][:2])
        set_apart(x.detach().view(-1, D), pair_weights, pair)
        set_apart(swiglu(gate, up).detach().view(-1, E), last_weights, last)
    ours, theirs = gated(groups, *inputs), of_groups(groups, *inputs)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    (dx, *found), (dx_want, *want) = (_gradients(y, inputs) for y in (ours, theirs))
    # Of h's gradient all is the same; of gate's and up's what autograd rounds on the way.
    assert torch.equal(found[5], want[5])
    for gradient, truth, operand in zip(found, want, inputs[1:], strict=True):
        assert gradient.dtype == operand.dtype and gradient.shape == operand.shape
        assert _error(gradient, truth) <= 2**-7
    # Of gradients that were rounded on the way, codes on either side.
    assert _error(dx, dx_want) < 0.01


@pytest.mark.parametrize("storage", STORAGES)
def test_gradients_are_as_near_to_float64s_as_the_groups(storage: Storage) -> None:
    groups, inputs = operands(storage, tokens=400)
    truth = _gradients(_exact(groups, *inputs), inputs)
    ours, theirs = (_gradients(run(groups, *inputs), inputs) for run in (gated, of_groups))
    for found, other, exact in zip(ours, theirs, truth, strict=True):
        # Two products stand before dx, of rounded weights and of rounded rows.
        assert _error(found, exact) < 0.03
        assert _error(found, exact) < 1.02 * _error(other, exact)


@pytest.mark.parametrize("storage", STORAGES)
def test_an_input_that_needs_no_gradient(storage: Storage) -> None:
    groups, (x, *trained) = operands(storage)
    want = _gradients(gated(groups, x, *trained), trained)
    found = _gradients(gated(groups, x.detach(), *trained), trained)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, want, strict=True))


@pytest.mark.parametrize("storage", STORAGES)
def test_h_is_not_kept(storage: Storage) -> None:
    groups, inputs = operands(storage)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gated(groups, *inputs)
    weights = {w.data_ptr() for w in (*groups[1], *groups[3])}
    own = [x for x in kept if x.data_ptr() not in weights and x.shape[:1] == (40,)]
    rows = [x.shape[1] for x in own]
    assert sorted(rows) == [6, 8, D, 2 * E]  # u's, x, gate and up


@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
def test_compiled_equals_launched(storage: Storage) -> None:
    groups, inputs = operands(storage)
    torch._dynamo.reset()
    run: Any = torch.compile(gated, backend="aot_eager_decomp_partition", fullgraph=True)
    found, want = run(groups, *inputs), gated(groups, *inputs)
    of_found, of_want = (_gradients(y, inputs) for y in (found, want))
    for ours, theirs in zip([found, *of_found], [want, *of_want], strict=True):
        assert _error(ours, theirs) <= 2**-8
    torch._dynamo.reset()


def test_the_tokens_may_be_none() -> None:
    groups, inputs = operands("int8", tokens=0)
    y = gated(groups, *inputs)
    assert y.shape == (2, 0, D)
    for gradient in torch.autograd.grad(y.sum(), inputs[1:]):
        assert not gradient.any()


def test_what_is_not_finite_stays_in_its_row() -> None:
    groups, inputs = operands("int8")
    before = gated(groups, *inputs)
    spoilt = inputs[0].detach().clone()
    spoilt[1, 3, 5] = torch.nan
    spoilt.requires_grad_()
    after = gated(groups, spoilt, *inputs[1:])
    is_row = torch.zeros(2, 20, dtype=torch.bool)
    is_row[1, 3] = True
    pairs = [(before, after)]
    pairs.append((_gradients(before, inputs[:1])[0], _gradients(after, [spoilt])[0]))
    for was, now in pairs:
        assert now[is_row].isnan().all() and torch.equal(now[~is_row], was[~is_row])


def _layout(**changed: Any) -> Layout:
    return Layout("int8", "int8", (32, 32), (4, 4), 1.0)._replace(**changed)


@pytest.mark.parametrize(
    ("pair", "last", "is_taken"),
    [
        ({}, {}, True),
        ({"storage": "nf4"}, {"storage": "nf4"}, True),
        ({"ranks": (4, 8), "scale": 2.0}, {"ranks": (LARGEST_RANK,)}, True),
        ({}, {"ranks": (LARGEST_RANK + 1,)}, False),
        ({}, {"ranks": (0,)}, False),
        ({"ranks": (4, 0)}, {}, False),
        ({"ranks": (0, 4)}, {}, False),
        ({"sizes": (32, 16)}, {}, False),
        ({"sizes": (32,), "ranks": (4,)}, {}, False),
        ({"sizes": (32, 32, 32), "ranks": (4, 4, 4)}, {}, False),
        ({}, {"sizes": (32, 32), "ranks": (4, 4)}, False),
        ({"storage": "fp8", "products": "fp8"}, {"storage": "fp8", "products": "fp8"}, False),
        ({"storage": "nf4", "products": "bf16"}, {"storage": "nf4", "products": "bf16"}, False),
    ],
)
def test_what_it_takes(pair: Any, last: Any, is_taken: bool) -> None:
    down = _layout(**{"sizes": (16,), "ranks": (4,)} | last)
    assert takes(_layout(**pair), down) == is_taken
