"""Packed rows give each example the loss it has alone, and models that leak are found out."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen3Config,
)

from tests.data.test_pack import random_examples
from tunefork.data.isolation import keeps_apart
from tunefork.data.pack import MicroBatch, pack

LENGTHS = [9, 3, 1, 2, 20, 7, 1]

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma3": Gemma3TextConfig(
        **GROUPED,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": Phi3Config(**SHAPE, num_key_value_heads=2),
    "phi3 sliding": Phi3Config(**SHAPE, num_key_value_heads=2, sliding_window=5),
    "mistral": MistralConfig(**GROUPED, sliding_window=4),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
}
LEAKY = {
    "opt": OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
    ),
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(config: Any, attention: str) -> nn.Module:
    """A random model whose weights are large enough that a leak shows."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model.eval()


@torch.no_grad()
def example_losses(model: nn.Module, batches: list[MicroBatch], count: int) -> Tensor:
    """Summed loss of each example: (count,)"""
    losses = torch.zeros(count)
    for batch in batches:
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits
        flat = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        is_real = batch.example >= 0
        losses.index_add_(0, batch.example[is_real], flat.view_as(batch.targets)[is_real])
    return losses


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_loss_is_unpacked_loss(name: str, attention: str) -> None:
    model = tiny(CONFIGS[name], attention)
    examples = random_examples(LENGTHS)
    alone = torch.cat(
        [
            example_losses(model, pack([example], max_tokens=20, packing=False), 1)
            for example in examples
        ]
    )
    assert alone.max() > 1.0
    layouts = [
        {"max_tokens": 64, "packing": False},
        {"max_tokens": 64, "packing": True},  # several rows of several examples
        {"max_tokens": 128, "packing": True, "row_length": 128},  # one row
        {"max_tokens": 20, "packing": True},  # one row a batch, some without padding
    ]
    for layout in layouts:
        packed = example_losses(model, pack(examples, **layout), len(examples))  # type: ignore[arg-type]
        # fp32 rounds at 6e-8; losses reach 100, sums run over up to 20 terms.
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_keep_examples_apart(name: str) -> None:
    model = tiny(CONFIGS[name], "sdpa").train()
    assert keeps_apart(model)
    assert model.training


@pytest.mark.parametrize("name", LEAKY)
def test_models_that_leak(name: str) -> None:
    assert not keeps_apart(tiny(LEAKY[name], "eager"))
