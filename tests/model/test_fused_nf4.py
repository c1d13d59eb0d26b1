"""A model over NF4 that is trained by int8 products, and evaluated by those that serve it."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import tiny_model
from tunefork.kernels.layout import Products, Storage
from tunefork.model.build import build
from tunefork.model.fused import FusedGroup, fuse
from tunefork.model.layers import prepare_layers
from tunefork.model.linear import LoraLinear
from tunefork.recipe import Checkpointing, LoraSection, Method

IDS = torch.arange(3, 67).view(2, 32)
CPU = torch.device("cpu")
LORA = LoraSection(rank=4)


def fused(
    products: Products,
    *,
    calibrates: bool = False,
    lora: LoraSection = LORA,
    storage: Storage = "nf4",
) -> tuple[Any, list[FusedGroup]]:
    model = tiny_model("llama").bfloat16()
    build(model, Method.QLORA if storage == "nf4" else Method.LORA, lora, seed=0)
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            torch.nn.init.normal_(layer.lora_b, std=0.05)
    return model, fuse(model, storage, products, CPU, IDS if calibrates else None)


def _loss(model: Any) -> torch.Tensor:
    logits = model(input_ids=IDS, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())


def _step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = _loss(model)
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if p.requires_grad}


def test_it_is_evaluated_as_it_is_served() -> None:
    (mixed, _), (exact, _) = fused("int8", calibrates=True), fused("bf16")
    with torch.no_grad():
        evaluated = _loss(mixed.eval())
        assert torch.equal(evaluated, _loss(exact.eval()))
        assert not torch.equal(evaluated, _loss(mixed.train()))
        assert torch.equal(_loss(exact), evaluated)


@pytest.mark.parametrize("is_training", [False, True])
def test_every_layer_goes_through_the_product_of_its_mode(is_training: bool) -> None:
    (mixed, _), (exact, _) = fused("int8", calibrates=True), fused("bf16")
    block = mixed.model.layers[0], exact.model.layers[0]
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for model in (mixed, exact):
        model.train(is_training)
        _loss(model)  # its hooks run: deltas are current
    for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"):
        ours, theirs = (one.get_submodule(path) for one in block)
        given, found = x.clone(), []
        for has_graph in (False, True):
            with torch.set_grad_enabled(has_graph):
                found.append(ours(given).detach())
        assert torch.equal(*found)
        assert torch.equal(found[0], theirs(given).detach()) == (not is_training)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_loss_and_gradients_are_near_those_of_bf16_products(dropout: float) -> None:
    """Deltas with dropout are products of their own."""
    lora = LoraSection(rank=4, dropout=dropout)
    pairs = []
    for products in ("bf16", "int8"):
        model = fused(products, calibrates=True, lora=lora)[0].train()
        torch.manual_seed(2)
        pairs.append(_step(model))
    (want_loss, want), (loss, found) = pairs
    torch.testing.assert_close(loss, want_loss, rtol=2e-3, atol=0)
    of_all = [torch.cat([of[name].flatten() for name in want]) for of in (found, want)]
    assert float((of_all[0] - of_all[1]).norm()) < 0.1 * float(of_all[1].norm())


@pytest.mark.parametrize("checkpointing", ["full", "offload"])
def test_a_second_run_gives_the_same_gradients(checkpointing: Checkpointing) -> None:
    (plain, _), (kept, _) = fused("int8", calibrates=True), fused("int8", calibrates=True)
    prepare_layers(kept, checkpointing, compiles=False)
    (loss, want), (again, found) = _step(plain.train()), _step(kept.train())
    assert torch.equal(again, loss)
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled_layers_are_one_graph_with_the_same_gradients(
    checkpointing: Checkpointing,
) -> None:
    (plain, _), (compiled, _) = fused("int8", calibrates=True), fused("int8", calibrates=True)
    torch._dynamo.reset()
    compiler = partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True)
    prepare_layers(compiled, checkpointing, compiles=True, dynamic=False, compiler=compiler)
    (loss, want), (again, found) = _step(plain.train()), _step(compiled.train())
    torch.testing.assert_close(again, loss, rtol=0, atol=1e-3)
    for name, gradient in want.items():
        assert (found[name] - gradient).norm() < 5e-2 * gradient.norm(), name
