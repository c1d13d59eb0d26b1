"""On a CUDA device: the kernel is the definition, with the CPU's noise, at any size."""

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from tests.kernels.test_adamw import _factors, _keys
from tunefork.kernels.adamw import (
    adamw_bf16_,
    adamw_wide_,
    noise,
    prepare,
    prepare_wide,
    rounded,
    update_bf16_,
    update_wide_,
    write_rounded_,
)
from tunefork.train import optim
from tunefork.train.adamw_bf16 import Bf16AdamW
from tunefork.train.clip import global_norm
from tunefork.train.optim import ShadowAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = ((64, 64), (576,), (100, 3), (4096, 1024), (7,), (64,), (128_256, 64), (65, 65))


Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _tensors(shape: tuple[int, ...]) -> Four:
    """p, g, m and v."""
    torch.manual_seed(0)
    p, g, m, v = torch.randn(shape), torch.randn(shape), torch.randn(shape) * 0.1, torch.rand(shape)
    return p.bfloat16(), g.bfloat16(), m.bfloat16(), v.bfloat16()


def _on_device(tensors: Four) -> Four:
    p, g, m, v = tensors
    return p.cuda(), g.cuda(), m.cuda(), v.cuda()


def test_after_prepare_no_size_or_step_compiles_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunefork.kernels import adamw_triton

    kernels = (adamw_triton._update, adamw_triton._update_wide, adamw_triton._round_to)
    for kernel in kernels:  # whatever other tests have compiled
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    weights = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for shape in SHAPES]
    prepare(weights)
    prepare(weights, only_rounds=True)
    for keeps_shadows in (True, False):
        prepare_wide(weights, keeps_shadows=keeps_shadows)

    def compile_(*args: object, **options: object) -> None:
        raise AssertionError("compiled after prepare")

    for kernel in kernels:
        monkeypatch.setattr(kernel, "_do_compile", compile_)
    for step, shape in enumerate(SHAPES, 1):
        p, g, m, v = _on_device(_tensors(shape))
        update_bf16_(p, g, m, v, _factors(step), _keys(step, step))
        write_rounded_(p, g.float(), _keys(step, step))
        for shadow in (None, p.float()):
            update_wide_(p, g, m.float(), v.float(), _factors(step), _keys(step, step), shadow)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_the_function(shape: tuple[int, ...]) -> None:
    """Bit for bit but for one in a thousand, where a fused multiply-add moved what is rounded."""
    host = _tensors(shape)
    device, eager = _on_device(host), _on_device(host)
    update_bf16_(*host, _factors(3), _keys())
    update_bf16_(*device, _factors(3), _keys())
    with torch.no_grad():
        adamw_bf16_(*eager, _factors(3), _keys())
    for expected in (host, eager):
        for a, b in zip(device, expected, strict=True):
            a, b = a.cpu(), b.cpu()
            assert int((a != b).sum()) <= max(1, a.numel() // 1000)
            torch.testing.assert_close(a.float(), b.float(), rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("keeps_shadow", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_with_fp32_moments_is_the_function(
    shape: tuple[int, ...], keeps_shadow: bool
) -> None:
    """fp32 to a few roundings of what is added up, and p but for one in a thousand."""
    p, g, m, v = _tensors(shape)
    host = [p, m.float(), v.float()]
    host += [p + 1e-4 * torch.randn(shape)] if keeps_shadow else []
    device = [tensor.cuda() for tensor in host]
    kept, kept_there = (host[3], device[3]) if keeps_shadow else (None, None)
    with torch.no_grad():
        adamw_wide_(host[0], g, host[1], host[2], _factors(3), _keys(), kept)
    update_wide_(device[0], g.cuda(), device[1], device[2], _factors(3), _keys(), kept_there)
    found, expected = device[0].cpu(), host[0]
    assert int((found != expected).sum()) <= max(1, found.numel() // 1000)
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=1e-6)
    for a, b in zip(device[1:], host[1:], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keeps_shadows", [True, False])
def test_at_once_it_trains_as_the_way_through_a_shadow_does(
    keeps_shadows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of PyTorch's fused AdamW on fp32 copies. Its 1 - beta2 may be fp32's, which is
    5e-5 beside; a step counts from what the step before rounded, so differences add up."""

    def run() -> tuple[list[torch.nn.Parameter], dict[str, Tensor], int]:
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape).bfloat16().cuda()) for shape in SHAPES]
        optimizer = ShadowAdamW(
            weights,
            keep_shadows=keeps_shadows,
            eight_bit=False,
            betas=(0.9, 0.999),
            weight_decay=0.1,
        )
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape).bfloat16().cuda()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.step(1e-3, 0.5)
            taken = torch.cuda.max_memory_allocated() - before
        return weights, optimizer.state_tensors(), taken

    weights, states, taken = run()
    assert taken < 2**20
    monkeypatch.setattr(optim, "_allows_at_once", lambda parameter: False)
    wanted_weights, wanted, room = run()
    assert room >= 4 * max(weight.numel() for weight in weights)
    assert list(states) == list(wanted)
    for name, tensor in wanted.items():
        is_square = name.endswith("exp_avg_sq")
        rtol, atol = (1e-4, 1e-9) if is_square else (1e-5, 1e-6)
        torch.testing.assert_close(states[name].cpu(), tensor.cpu(), rtol=rtol, atol=atol)
    for found, expected in zip(weights, wanted_weights, strict=True):
        a, b = found.detach().float(), expected.detach().float()
        assert int((a != b).sum()) <= max(2, a.numel() * 4 // 1000)
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2e-5)


def test_noise_and_rounding_are_the_cpus_bit_for_bit() -> None:
    wide = torch.randn(1000, 64)
    wide[0, :2] = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)  # NaN
    p = torch.zeros(1000, 64, dtype=torch.bfloat16, device="cuda")
    write_rounded_(p, wide.cuda(), _keys())
    bits = noise(wide, _keys())
    assert torch.equal(noise(wide.cuda(), _keys()).cpu(), bits)
    expected = rounded(wide, bits & 0xFFFF)
    assert torch.equal(p.cpu().isnan(), expected.isnan())
    assert torch.equal(p.cpu().nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float32])
def test_an_fp32_weight_is_not_rounded_and_a_gradient_may_lie_otherwise(
    gradient: torch.dtype,
) -> None:
    torch.manual_seed(0)
    moments = torch.randn(48, 80).bfloat16() * 0.1, torch.rand(48, 80).bfloat16()
    host = (torch.randn(48, 80), torch.randn(80, 48).to(gradient).t(), *moments)
    device = _on_device(host)
    assert not device[1].is_contiguous()
    update_bf16_(*host, _factors(3), _keys())
    update_bf16_(*device, _factors(3), _keys())
    torch.testing.assert_close(device[0].cpu(), host[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(device[2:], host[2:], strict=True):
        assert int((a.cpu() != b).sum()) <= b.numel() // 1000


@pytest.mark.slow
def test_a_weight_of_more_elements_than_an_int32_numbers() -> None:
    """17 GiB on the device. Its end against the definition on a CPU, at the end's number."""
    numel, tail = 2**31 + 4096, 8192
    host = _tensors((tail,))
    p, g, m, v = (torch.zeros(numel, dtype=torch.bfloat16, device="cuda") for _ in host)
    device = (p, g, m, v)
    for whole, end in zip(device, host, strict=True):
        whole[-tail:] = end.cuda()
    update_bf16_(*device, _factors(3), _keys())
    adamw_bf16_(*host, _factors(3), _keys(), first=numel - tail)
    for whole, end in zip(device, host, strict=True):
        assert int((whole[-tail:].cpu() != end).sum()) <= tail // 1000
        assert int(whole[: 2**20].count_nonzero()) == 0


def test_a_backward_pass_that_is_still_to_read_the_weight_fails() -> None:
    """As after any change in place: gradient release relies on it."""
    weight = torch.nn.Parameter(torch.randn(64, 64, device="cuda").bfloat16())
    out = (weight * weight).sum()
    _, g, m, v = _on_device(_tensors((64, 64)))
    update_bf16_(weight, g, m, v, _factors(1), _keys())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


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
