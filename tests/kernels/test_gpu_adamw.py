"""On a CUDA device: one compiled kernel for all sizes, the CPU's noise, the CPU's numbers."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.kernels.test_adamw import _factors, _keys
from tunefork.kernels.adamw import (
    adamw_bf16_,
    compiled,
    noise,
    prepare,
    rounded,
    update_bf16_,
    write_rounded_,
)
from tunefork.train.adamw_bf16 import Bf16AdamW
from tunefork.train.clip import global_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = ((64, 64), (576,), (100, 3), (4096, 1024), (7,), (64,), (128_256, 64), (65, 65))


def _tensors(shape: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    drawn = [torch.randn(shape), torch.randn(shape), torch.randn(shape) * 0.1, torch.rand(shape)]
    return [tensor.bfloat16() for tensor in drawn]


def test_one_kernel_a_form_serves_all_sizes_and_steps() -> None:
    torch._dynamo.reset()
    compiled.cache_clear()
    before = counters["stats"]["unique_graphs"]
    prepare(torch.device("cuda"))
    assert counters["stats"]["unique_graphs"] - before <= 2
    for step, shape in enumerate(SHAPES, 1):
        tensors = [tensor.cuda() for tensor in _tensors(shape)]
        update_bf16_(*tensors, _factors(step).cuda(), _keys(step, step).cuda())  # type: ignore[call-arg]
    # Of 8 sizes in two forms; measured 6 with torch 2.11.
    assert counters["stats"]["unique_graphs"] - before <= 6


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_the_function(shape: tuple[int, ...]) -> None:
    """Bit for bit but for one in a thousand, where a fused multiply-add moved what is rounded."""
    host = _tensors(shape)
    device = [tensor.cuda() for tensor in host]
    eager = [tensor.clone() for tensor in device]
    update_bf16_(*host, _factors(3), _keys())  # type: ignore[call-arg]
    update_bf16_(*device, _factors(3).cuda(), _keys().cuda())  # type: ignore[call-arg]
    with torch.no_grad():
        adamw_bf16_(*eager, _factors(3).cuda(), _keys().cuda())  # type: ignore[call-arg]
    for expected in (host, eager):
        for a, b in zip(device, expected, strict=True):
            a, b = a.cpu(), b.cpu()
            assert int((a != b).sum()) <= max(1, a.numel() // 1000)
            torch.testing.assert_close(a.float(), b.float(), rtol=2**-6, atol=1e-6)


def test_noise_and_rounding_are_the_cpus_bit_for_bit() -> None:
    wide = torch.randn(1000, 64)
    wide[0, :2] = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)  # NaN
    p = torch.zeros(1000, 64, dtype=torch.bfloat16, device="cuda")
    write_rounded_(p, wide.cuda(), _keys().cuda())
    bits = noise(wide, _keys())
    assert torch.equal(noise(wide.cuda(), _keys().cuda()).cpu(), bits)
    expected = rounded(wide, bits & 0xFFFF)
    assert torch.equal(p.cpu().isnan(), expected.isnan())
    assert torch.equal(p.cpu().nan_to_num(), expected.nan_to_num())


def test_two_runs_of_the_optimiser_are_bit_equal_and_take_no_further_memory() -> None:
    ends, taken = [], []
    for _ in range(2):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(4096, 1024).bfloat16().cuda()) for _ in range(3)]
        optimizer = Bf16AdamW(weights, betas=(0.9, 0.999), weight_decay=0.1)
        for number in range(3):
            for weight in weights:
                weight.grad = torch.randn(4096, 1024, device="cuda").bfloat16()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.step(1e-3, 0.5)
            if number:
                taken.append(torch.cuda.max_memory_allocated() - before)
        ends.append([weight.detach().clone() for weight in weights])
    assert all(map(torch.equal, *ends))
    assert max(taken) < 2**20


def test_the_norm_is_summed_in_fp32() -> None:
    weight = torch.nn.Parameter(torch.zeros(4096, 4096, dtype=torch.bfloat16, device="cuda"))
    weight.grad = torch.randn(4096, 4096, device="cuda").bfloat16()
    assert global_norm([weight]) == pytest.approx(float(weight.grad.double().norm()), rel=1e-5)
