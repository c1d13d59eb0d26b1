"""`down` from gate and up on against SwiGLU and the group of one layer that it stands in for."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunefork.kernels.gated import LARGEST_RANK
from tunefork.kernels.gated_lora import gated_lora, takes
from tunefork.kernels.layout import Layout, Storage
from tunefork.kernels.lora_group import lora_group
from tunefork.kernels.quantized import nf4_tensors, quantize_nf4

SCALE, INNER, OUT, RANK = 0.5, 48, 32, 4


def _operands(
    storage: Storage, dtype: torch.dtype
) -> tuple[Layout, tuple[Tensor, ...], list[Tensor]]:
    """A layout, its weights, and gate, up, A and B."""
    torch.manual_seed(0)
    layout = Layout(storage, "bf16", (OUT,), (RANK,), SCALE)
    weight = torch.randn(OUT, INNER).to(dtype)
    weights = nf4_tensors(*quantize_nf4(weight)) if storage == "nf4" else (weight,)
    inputs = [torch.randn(2, 5, INNER).to(dtype) for _ in range(2)]
    inputs += [torch.randn(RANK, INNER), torch.randn(OUT, RANK)]
    return layout, weights, [x.requires_grad_() for x in inputs]


def _of_a_group(layout: Layout, weights: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
    gate, up, a, b = inputs
    h = (F.silu(gate.float()) * up.float()).to(gate.dtype)
    [y] = lora_group(h, layout, weights, [a], [b])
    return y


def _gated(layout: Layout, weights: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
    gate, up, a, b = inputs
    return gated_lora(gate, up, layout, weights, a, b)


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_group(storage: Storage, dtype: torch.dtype) -> None:
    layout, weights, inputs = _operands(storage, dtype)
    assert takes(layout)
    ours, theirs = _gated(layout, weights, *inputs), _of_a_group(layout, weights, *inputs)
    assert torch.equal(ours, theirs)
    upstream = torch.randn(2, 5, OUT).to(dtype)
    found, want = (torch.autograd.grad(y, inputs, upstream) for y in (ours, theirs))
    for gradient, truth, operand in zip(found, want, inputs, strict=True):
        assert gradient.dtype == operand.dtype and gradient.shape == operand.shape
        # Of silu's two steps autograd rounds neither.
        bound = 1e-6 if dtype == torch.float32 else 2**-8
        assert (gradient - truth).norm() <= bound * truth.norm()


@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
def test_compiled_equals_launched() -> None:
    layout, weights, inputs = _operands("bf16", torch.bfloat16)
    upstream = torch.randn(2, 5, OUT).bfloat16()
    torch._dynamo.reset()
    run = torch.compile(_gated, backend="aot_eager_decomp_partition", fullgraph=True)
    found, want = run(layout, weights, *inputs), _gated(layout, weights, *inputs)
    of_found, of_want = (torch.autograd.grad(y, inputs, upstream) for y in (found, want))
    for ours, theirs in zip([found, *of_found], [want, *of_want], strict=True):
        assert (ours - theirs).norm() <= 2**-8 * theirs.norm()
    torch._dynamo.reset()


def test_h_is_not_kept() -> None:
    layout, weights, inputs = _operands("bf16", torch.bfloat16)
    kept: list[Any] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _gated(layout, weights, *inputs)
    places = [x.untyped_storage().data_ptr() for x in inputs[:2]]
    large = [x for x in kept if x.shape[-1] == INNER and x.shape[0] == 10]
    assert [x.untyped_storage().data_ptr() for x in large] == places


def test_the_tokens_may_be_none() -> None:
    layout, weights, inputs = _operands("bf16", torch.float32)
    gate, up = (x[:, :0] for x in inputs[:2])
    y = _gated(layout, weights, gate, up, *inputs[2:])
    assert y.shape == (2, 0, OUT)
    for gradient in torch.autograd.grad(y.sum(), inputs[2:]):
        assert not gradient.any()


@pytest.mark.parametrize(
    ("layout", "is_taken"),
    [
        (Layout("bf16", "bf16", (32,), (LARGEST_RANK,), 1.0), True),
        (Layout("nf4", "bf16", (32,), (4,), 1.0), True),
        (Layout("bf16", "bf16", (32,), (LARGEST_RANK + 1,), 1.0), False),
        (Layout("bf16", "bf16", (32,), (0,), 1.0), False),
        (Layout("bf16", "bf16", (128,), (4,), 1.0), True),
        (Layout("bf16", "bf16", (32, 16), (4, 0), 1.0), False),
        (Layout("nf4", "int8", (32,), (4,), 1.0), False),
        (Layout("int8", "int8", (32,), (4,), 1.0), False),
    ],
)
def test_what_it_takes(layout: Layout, is_taken: bool) -> None:
    assert takes(layout) == is_taken
