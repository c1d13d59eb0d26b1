"""On a CUDA device: a captured backward pass writes into the flat gradient, and memory is kept."""

import pytest
import torch
from torch import nn

from tunefork.train.adamw_lora import LoraAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _made() -> tuple[list[nn.Parameter], LoraAdamW]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(16, size).cuda()) for size in (4096, 1000, 30)]
    return parameters, LoraAdamW(parameters, betas=(0.9, 0.999), weight_decay=0.0)


def test_replayed_passes_train_like_eager_ones() -> None:
    (eager, plain), (captured, optimizer) = _made(), _made()
    x = torch.randn(4096, device="cuda")

    def backward(parameters: list[nn.Parameter]) -> None:
        torch.stack(
            [((p * x[: p.shape[1]]).sum(-1) ** 2).sum() for p in parameters]
        ).sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        backward(captured)
    torch.cuda.current_stream().wait_stream(stream)
    for parameter in captured:
        parameter.grad = None
    optimizer.attach_gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward(captured)
    optimizer.flat.gradient.zero_()
    for _ in range(3):
        backward(eager)
        graph.replay()
        assert optimizer.gradient_norm() == pytest.approx(plain.gradient_norm(), rel=1e-5)
        plain.step(1e-3)
        optimizer.step(1e-3)
    for a, b in zip(captured, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_the_old_parameters_are_freed() -> None:
    before = torch.cuda.memory_allocated()
    parameters = [nn.Parameter(torch.randn(1024, 1024, device="cuda")) for _ in range(8)]
    optimizer = LoraAdamW(parameters, betas=(0.9, 0.999), weight_decay=0.0)
    taken = torch.cuda.memory_allocated() - before
    assert taken == pytest.approx(2 * 8 * 2**22, rel=0.01)  # values and gradients
    optimizer.step(1e-3)
    assert torch.cuda.memory_allocated() - before == pytest.approx(4 * 8 * 2**22, rel=0.01)
