"""However layers are kept or run again, losses and gradients are those of none."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._functorch._aot_autograd.utils import make_boxed_func
from transformers import BloomConfig, BloomForCausalLM

from tests.tiny import tiny_model
from tunefork.data.pack import Segments
from tunefork.kernels.layout import Products, Storage
from tunefork.model import attention
from tunefork.model.build import build
from tunefork.model.fused import fuse
from tunefork.model.layers import compile_last_norm, decoder_layers, prepare_layers
from tunefork.model.linear import LoraLinear
from tunefork.model.packed_attention import in_place_of_mask
from tunefork.recipe import Checkpointing, LoraSection, Method

IDS = torch.arange(3, 35).view(2, 16)


def _built(kind: str, **options: Any) -> Any:
    model = tiny_model("llama", **options)
    method = Method.FULL if kind == "full" else Method.QLORA if kind == "qlora" else Method.LORA
    build(model, method, LoraSection(rank=4, dropout=0.2 if kind == "dropout" else 0.0), seed=0)
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            torch.nn.init.normal_(layer.lora_b, std=0.05)
    return model.train()


def _step(model: Any, **told: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    logits = model(input_ids=IDS, use_cache=False, **told).logits
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
    ("storage", "products", "checkpointing"),
    [
        ("bf16", "bf16", "offload"),
        pytest.param("bf16", "bf16", "full", marks=pytest.mark.slow),
        pytest.param("nf4", "int8", "offload", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_second_run_makes_only_what_is_read(
    storage: Storage, products: Products, checkpointing: Checkpointing
) -> None:
    """Not the layer's last product, nor attention, whose result is offloaded beside the input."""
    attention.register()
    kind = "qlora" if storage == "nf4" else "lora"
    plain, kept = (_built(kind, attn_implementation=attention.NAME).bfloat16() for _ in range(2))
    graphs: list[list[str]] = []

    def backend(graph: Any, example: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def noting(module: Any, inputs: Any) -> Any:
            graphs.append([str(node.target) for node in module.graph.nodes])
            return make_boxed_func(module.forward)

        def run(module: Any, inputs: Any) -> Any:
            return make_boxed_func(module.forward)

        return aot_autograd(fw_compiler=noting, bw_compiler=run)(graph, example)

    for model in (plain, kept):
        fuse(model, storage, products, torch.device("cpu"))
    prepare_layers(plain, checkpointing, compiles=False)
    compiler = partial(torch.compile, backend=backend, fullgraph=True)
    prepare_layers(kept, checkpointing, compiles=True, dynamic=False, compiler=compiler)
    torch._dynamo.reset()
    told = in_place_of_mask(Segments.of([5, 9, 2, 16], rows=2), 16)
    (loss, gradients), (again, by_kept) = _step(plain, **told), _step(kept, **told)
    torch.testing.assert_close(again, loss, rtol=0, atol=1e-3)
    for name, want in gradients.items():
        error = (by_kept[name] - want).norm() / want.norm()
        assert error < 5e-2, name  # attention's gradient adds up in another order, in bf16
    kinds = (".mm", "_product")
    products_of = [sum(any(kind in name for kind in kinds) for name in graph) for graph in graphs]
    attends = [any("_softmax" in name for name in graph) for graph in graphs]
    first, second = products_of  # one form each for all layers
    assert first > second > 0, graphs
    assert attends == [True, checkpointing == "full"]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
def test_layers_below_the_first_that_is_trained_have_no_gradient(
    checkpointing: Checkpointing,
) -> None:
    torch.manual_seed(0)
    model = tiny_model()
    top = len(decoder_layers(model)) - 1
    build(model, Method.LORA, LoraSection(targets=(f"layers.{top}.mlp.down_proj",)), seed=0)
    prepare_layers(model.train(), checkpointing, compiles=True, compiler=lambda run, dynamic: run)
    needed = list[bool]()
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda *given: needed.append(given[2].requires_grad))
    _step(model)
    assert needed[: top + 1] == [False] * top + [True]


@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
def test_the_norm_behind_the_layers_runs_compiled_while_it_is_trained() -> None:
    plain, ours = (_built("lora") for _ in range(2))
    loss, wanted = _step(plain)
    forms = []

    def backend(graph: Any, example: Any) -> Any:
        forms.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_last_norm(ours, partial(torch.compile, backend=backend))
    again, found = _step(ours)
    assert len(forms) == 1
    torch.testing.assert_close(again, loss)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)
    with torch.no_grad():
        ours.eval()(input_ids=IDS[:, :5])
    assert len(forms) == 1
    torch._dynamo.reset()


def test_norms_before_the_layers_run_as_written() -> None:
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    model = BloomForCausalLM(config)
    compile_last_norm(model, lambda run, dynamic: run)
    assert "forward" in vars(model.transformer.ln_f)
    assert "forward" not in vars(model.transformer.word_embeddings_layernorm)
