"""SwiGLU's gradients in a compiled backward pass: dup is written over dh, of which no copy is made.

The operators are a GPU's; here definitions that write as they do stand in for them.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from tests.kernels import test_gated_lora, test_int8_gated
from tunefork.kernels import bf16_product, gated_lora, int8, int8_product
from tunefork.kernels import gated as kernel

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the compiler's about itself


def _gradients(gate: Tensor, up: Tensor, dh: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup, da = kernel.gated_gradients_reference(gate, up, dh, du)
    dh.copy_(dup)
    return dgate, da


def _gradients_and_maxima(
    gate: Tensor, up: Tensor, dh: Tensor, du: Tensor, fold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dgate, dup, da, most = kernel.gated_gradients_and_maxima_reference(gate, up, dh, du, fold)
    dh.copy_(dup)
    return dgate, da, most


def _bf16_product(
    parts: list[Tensor], b: Tensor, u: Tensor | None, v: Tensor | None, is_turned: bool
) -> Tensor:
    return bf16_product.bf16_product_reference(parts, b, u, v, is_turned=is_turned)


def _by_operator(*operands: Any, is_turned: bool) -> Any:
    return torch.ops.tunefork.bf16_product(*operands, is_turned)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """On a CPU too; to be called once what they are compared with is there."""
    torch._dynamo.reset()
    with torch.library._scoped_library("tunefork", "FRAGMENT") as library:
        library.impl("gated_down", kernel.gated_down_reference, "CPU")
        library.impl("gated_gradients", _gradients, "CPU")
        library.impl("gated_gradients_and_maxima", _gradients_and_maxima, "CPU")
        library.impl("int8_product", int8_product.int8_product_reference, "CPU")
        monkeypatch.setattr(int8, "int8_product", torch.ops.tunefork.int8_product)
        library.impl("bf16_product", _bf16_product, "CPU")
        monkeypatch.setattr(gated_lora, "bf16_product", _by_operator)
        yield lambda: monkeypatch.setattr(kernel, "has_kernels", lambda *_: True)
    torch._dynamo.reset()


def _compiled(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], str]:
    """Gradients of the sum, and the backward pass's code up to the operator."""
    run: Any = torch.compile(function, fullgraph=True)

    def both_passes() -> list[Tensor]:
        return _differentiated(run, inputs)

    gradients, codes = run_and_get_code(both_passes)
    [code] = [code for code in codes if "tunefork.gated_gradients" in code]
    return gradients, code[
        code.index("def call") : code.index("torch.ops.tunefork.gated_gradients")
    ]


def _differentiated(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    y = function(*inputs)
    return [*torch.autograd.grad(y, [x for x in inputs if x.requires_grad], torch.ones_like(y))]


def _copies(code: str, maker: str, count: int) -> int:
    """Of what `maker` gives last, of so many numbers: new tensors, and copies in place."""
    after = code[code.rindex(maker) :]
    shapes = re.findall(r"empty_strided\w*\(\(([\d, ]+)\), .*bfloat16", after)
    sizes = [math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes]
    return sizes.count(count) + len(re.findall(r"fused\w*_clone_", after))


def _assert_near(found: list[Tensor], want: list[Tensor]) -> None:
    for ours, theirs in zip(found, want, strict=True):
        assert float((ours - theirs).norm()) <= 2**-6 * float(theirs.norm())


def test_of_a_last_layer(operators: Callable[[], None]) -> None:
    layout, weights, inputs = test_gated_lora._operands("bf16", torch.bfloat16)

    def function(gate: Tensor, up: Tensor, *trained: Tensor) -> Tensor:
        return test_gated_lora._gated(layout, weights, gate * 2, up * 2, *trained)

    want = _differentiated(function, inputs)
    operators()
    found, code = _compiled(function, inputs)
    assert _copies(code, "tunefork.bf16_product", 10 * test_gated_lora.INNER) == 0
    _assert_near(found, want)


@pytest.mark.parametrize("has_gradient", [True, False])
def test_of_an_mlp_in_int8(has_gradient: bool, operators: Callable[[], None]) -> None:
    groups, inputs = test_int8_gated.operands("int8")
    inputs[0].requires_grad_(has_gradient)

    def function(*inputs: Tensor) -> Tensor:
        return test_int8_gated.gated(groups, *inputs)

    want = _differentiated(function, inputs)
    operators()
    found, code = _compiled(function, inputs)
    assert _copies(code, "tunefork.int8_product", 40 * test_int8_gated.E) == 0
    _assert_near(found[has_gradient:], want[has_gradient:])
