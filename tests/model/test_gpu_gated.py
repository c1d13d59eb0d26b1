"""A model's MLPs on a GPU: that they take the kernels, launched and compiled, and the memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from tunefork.kernels.layout import Products, Storage
from tunefork.model import layers
from tunefork.model.build import build
from tunefork.model.fused import fuse
from tunefork.model.gated import Gated
from tunefork.model.layers import prepare_layers
from tunefork.recipe import LoraSection, Method

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
INNER, TOKENS, LAYERS = 1536, 4096, 4
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=512,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
    num_key_value_heads=2,
)


FORMS: list[tuple[Storage, Products]] = [("bf16", "bf16"), ("int8", "int8"), ("nf4", "int8")]


def _step(
    compiles: bool, storage: Storage, products: Products
) -> tuple[dict[str, Any], int, list[Any]]:
    """Gradients, the bytes that wait for the backward pass, and the MLPs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="sdpa")
    model.to("cuda", torch.bfloat16)
    method = Method.QLORA if storage == "nf4" else Method.LORA
    build(model, method, LoraSection(rank=16), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    fuse(model, storage, products, torch.device("cuda"))
    torch._dynamo.reset()
    prepare_layers(model.train(), "none", compiles=compiles)
    ids = torch.arange(TOKENS, device="cuda").view(2, -1) % 251
    for _ in range(2):  # what compiling takes is gone by then
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        held = torch.cuda.memory_allocated() - before
        loss.backward()
    torch._dynamo.reset()
    named = model.named_parameters()
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    return gradients, held, [m for m in model.modules() if isinstance(m, Gated)]


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(("storage", "products"), FORMS)
def test_the_step_is_the_same_and_h_is_not_kept(
    storage: Storage, products: Products, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunefork.kernels import gated_triton

    seen: list[Any] = []
    own = gated_triton.backward

    def noting(gate: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.append((tuple(gate.shape), "fold_1o" in more))
        return own(gate, *rest, **more)

    monkeypatch.setattr(gated_triton, "backward", noting)
    found, held, mlps = _step(compiles, storage, products)
    assert len(mlps) == LAYERS and len(seen) == 2 * LAYERS
    assert set(seen) == {((TOKENS, INNER), products == "int8")}
    monkeypatch.setattr(layers, "prepare_gated", lambda _: [])
    want, held_before, mlps = _step(compiles, storage, products)
    assert mlps == [] and len(seen) == 2 * LAYERS
    assert found.keys() == want.keys()
    # In int8 the codes of gate's and up's gradients lie over other scales.
    least = 0.999 if products == "bf16" else 0.99
    for name, gradient in want.items():
        assert F.cosine_similarity(found[name].flatten(), gradient.flatten(), 0) > least, name
    h_bytes = LAYERS * TOKENS * INNER * 2
    assert held_before - held >= 0.95 * h_bytes
