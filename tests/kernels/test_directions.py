"""Products whose inputs' main directions are multiplied apart."""

import pytest
import torch
from torch import Tensor

from tunefork.kernels import int8, int8_weight
from tunefork.kernels.directions import along, main_directions
from tunefork.kernels.layout import Layout, Storage
from tunefork.kernels.quantized import nf4_tensors, quantize_nf4

D, OUT = 256, 96


def _inputs(tokens: int, seed: int) -> Tensor:
    """As a layer's are: a mean, a few strong directions and channels, and a rest."""
    common = torch.Generator().manual_seed(0)
    mean, directions = torch.randn(D, generator=common), torch.randn(6, D, generator=common)
    own = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=own) * 0.3 + mean
    x += torch.randn(tokens, 6, generator=own) @ directions
    x[:, 7] *= 20
    return x.bfloat16()


def _weight() -> Tensor:
    drawn: Tensor = torch.randn(OUT, D, generator=torch.Generator().manual_seed(9)) * D**-0.5
    return drawn.bfloat16()


def _error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("rank", [0, 4, 64])
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_products_of_inputs_like_those_are_closer(storage: Storage, rank: int) -> None:
    check(storage, rank, torch.device("cpu"))


def check(storage: Storage, rank: int, device: torch.device) -> None:
    """A product on `device` with no directions apart, and with them, against float64."""
    weight = _weight().to(device)
    layout = Layout(storage, "int8", (OUT // 2, OUT // 2), (rank, 0), 2.0)
    generator = torch.Generator().manual_seed(1)
    a = [(torch.randn(rank, D, generator=generator) * D**-0.5).to(device)] if rank else []
    b = [(torch.randn(OUT // 2, rank, generator=generator) * 0.01).to(device)] if rank else []
    halves = list(weight.split(OUT // 2))
    own = halves
    if storage == "nf4":
        own = [tensor for half in halves for tensor in nf4_tensors(*quantize_nf4(half))]
    weights = int8_weight.int8_weights(own, layout, D)
    weight = int8_weight.dense(layout, weights, D, torch.float32, 0, 2)
    x, like_it = _inputs(64, seed=3).to(device), _inputs(200, seed=2).to(device)
    truth = x.double() @ weight.double().t()
    if rank:
        truth[:, : OUT // 2] += 2.0 * (x.double() @ a[0].double().t()) @ b[0].double().t()

    def product() -> Tensor:
        return torch.cat(int8.int8_lora(x, layout, weights, a, b), dim=1)

    before = _error(product(), truth)
    int8_weight.set_apart(like_it, weights, layout)
    after = _error(product(), truth)
    assert before > 0.012
    # 0.11 of it: what is left is the rounding of the rest of x, and of y to bf16.
    assert after < 0.2 * before


def test_the_input_gradient_has_no_directions_apart() -> None:
    layout = Layout("int8", "int8", (OUT,), (0,), 1.0)
    weights = int8_weight.int8_weights([_weight()], layout, D)
    x = _inputs(8, seed=3).requires_grad_()
    upstream = torch.randn(8, OUT, generator=torch.Generator().manual_seed(4)).bfloat16()
    gradients = list[Tensor]()
    for _ in range(2):
        [y] = int8.int8_lora(x, layout, weights, [], [])
        gradients += torch.autograd.grad(y, x, upstream)
        int8_weight.set_apart(x.detach(), weights, layout)
    assert torch.equal(*gradients)


def test_directions_are_the_main_ones_first_and_alike_whatever_a_rows_size() -> None:
    x = _inputs(300, seed=1).float()
    x[::3] *= 1000
    v = main_directions(x, 8)
    torch.testing.assert_close(v.t() @ v, torch.eye(8), atol=1e-5, rtol=0)
    unit = x / x.norm(dim=1, keepdim=True)
    want = torch.linalg.svdvals(unit).square()
    got = (unit @ v).square().sum(0)
    torch.testing.assert_close(got[0], want[0], rtol=1e-3, atol=0)
    assert float(got.sum()) > 0.99 * float(want[:8].sum())


def test_what_is_taken_out_along_a_direction_is_given_back_along_the_same() -> None:
    """V is read from x in bf16: W V must be of that V, or each token errs the same way."""
    weight = _weight()
    probe_md = main_directions(_inputs(64, 1), 16).t().bfloat16()
    want = weight.float() @ probe_md.t().float()
    assert torch.equal(along(weight, probe_md), want.bfloat16())
    layout = Layout("int8", "int8", (OUT,), (0,), 1.0)
    weights = int8_weight.int8_weights([weight], layout, D)
    int8_weight.set_apart(_inputs(64, 1), weights, layout)
    of_it = int8_weight.dense(layout, weights, D, torch.float32, 0, 1) @ weights[-1].t().float()
    torch.testing.assert_close(
        weights[-2].float(), of_it, rtol=0.02, atol=0.02 * float(of_it.std())
    )


def test_what_is_multiplied_apart_is_of_the_weights_that_were_rounded() -> None:
    """Along the main directions a product has no error of the weights' rounding."""
    weight, x = _weight(), _inputs(64, seed=3)
    layout = Layout("int8", "int8", (OUT // 2, OUT // 2), (0, 0), 1.0)
    halves = list(weight.split(OUT // 2))
    weights = int8_weight.int8_weights(halves, layout, D)
    truth, errors = x.double() @ weight.double().t(), []
    for exact in ([], halves):
        int8_weight.set_apart(_inputs(200, seed=2), weights, layout, exact)
        errors.append(_error(torch.cat(int8.int8_lora(x, layout, weights, [], []), dim=1), truth))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("size", [16, 32])
def test_fewer_inputs_or_rows_than_directions_are_enough(size: int) -> None:
    weight = torch.randn(OUT, size, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(3, size)
    x[1] = torch.randn(size, generator=torch.Generator().manual_seed(1))
    layout = Layout("int8", "int8", (OUT,), (0,), 1.0)
    weights = int8_weight.int8_weights([weight], layout, size)
    int8_weight.set_apart(x, weights, layout)
    assert all(bool(tensor.isfinite().all()) for tensor in weights[-2:])
