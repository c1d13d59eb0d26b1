"""However layers are kept or run again, losses and gradients are those of none."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._functorch._aot_autograd.utils import make_boxed_func

from tests.tiny import tiny_model
from tunefork.kernels.layout import Products, Storage
from tunefork.model.build import build
from tunefork.model.fused import fuse
from tunefork.model.layers import decoder_layers, prepare_layers
from tunefork.model.linear import LoraLinear
from tunefork.recipe import Checkpointing, LoraSection, Method

IDS = torch.arange(3, 35).view(2, 16)


def _built(kind: str) -> Any:
    model = tiny_model("llama")
    method = Method.FULL if kind == "full" else Method.QLORA if kind == "qlora" else Method.LORA
    build(model, method, LoraSection(rank=4, dropout=0.2 if kind == "dropout" else 0.0), seed=0)
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            torch.nn.init.normal_(layer.lora_b, std=0.05)
    return model.train()


def _step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    logits = model(input_ids=IDS, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", ["selective", "full", "offload"])
@pytest.mark.parametrize("kind", ["lora", "dropout", "full"])
def test_the_gradient_is_that_of_none(kind: str, checkpointing: Checkpointing) -> None:
    plain, kept = _built(kind), _built(kind)
    prepare_layers(plain, "none", compiles=False)
    for _ in range(2):  # twice changes nothing
        prepare_layers(kept, checkpointing, compiles=False)
    (loss, gradients), (again, by_kept) = _step(plain), _step(kept)
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    assert gradients.keys() == by_kept.keys() and len(gradients) > 4
    for name, want in gradients.items():
        assert want is not None and by_kept[name] is not None, name
        torch.testing.assert_close(by_kept[name], want, rtol=1e-5, atol=1e-7)


def test_evaluation_and_generation_take_the_layers_as_written() -> None:
    model, ran = _built("lora"), 0

    def compiler(run: Any, **_: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal ran
            ran += 1
            return run(*args, **kwargs)

        return counted

    prepare_layers(model, "none", compiles=True, compiler=compiler)
    model.eval()(input_ids=IDS)
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        model.train()(input_ids=IDS)
    assert ran == 0
    model(input_ids=IDS, use_cache=False)
    assert ran == len(decoder_layers(model)) == 2


@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
@pytest.mark.parametrize(
    ("storage", "products"),
    [("bf16", "bf16"), pytest.param("nf4", "fp8", marks=pytest.mark.slow)],
)
def test_a_compiled_second_run_makes_no_result(storage: Storage, products: Products) -> None:
    """What nobody reads is not made: a layer's last product is in the first run's code alone."""
    plain, kept = (_built("qlora" if storage == "nf4" else "lora").bfloat16() for _ in range(2))
    graphs: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def noting(module: Any, inputs: Any) -> Any:
            called = [str(node.target) for node in module.graph.nodes]
            graphs.append(sum(".mm" in name or ".addmm" in name for name in called))
            return make_boxed_func(module.forward)

        def run(module: Any, inputs: Any) -> Any:
            return make_boxed_func(module.forward)

        return aot_autograd(fw_compiler=noting, bw_compiler=run)(graph, example)

    for model in (plain, kept):
        fuse(model, storage, products, torch.device("cpu"))
    prepare_layers(plain, "offload", compiles=False)
    compiler = partial(torch.compile, backend=backend, fullgraph=True)
    prepare_layers(kept, "offload", compiles=True, dynamic=False, compiler=compiler)
    torch._dynamo.reset()
    (loss, gradients), (again, by_kept) = _step(plain), _step(kept)
    torch.testing.assert_close(again, loss, rtol=0, atol=1e-3)
    for name, want in gradients.items():
        error = (by_kept[name] - want).norm() / want.norm()
        assert error < 1e-2, name
    first, second = graphs  # one form each for all layers
    assert first > second > 0
