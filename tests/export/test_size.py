"""What the adapter of a 70B model takes on disk, from its shapes alone."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tunefork.model.build import find_targets


def test_the_adapter_of_a_70b_model_is_under_a_gigabyte() -> None:
    config = LlamaConfig(  # Llama-3.1-70B
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128_256,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) > 70e9
    rank, paths = 16, find_targets(model, "all-linear")
    layers = [model.get_submodule(path) for path in paths]
    values = sum(rank * (layer.in_features + layer.out_features) for layer in layers)
    assert len(paths) == 560 and values == 207_093_760
    assert 2 * values == 414_187_520  # bf16
    assert 4 * values == 828_375_040 < 1e9  # fp32, as trained and saved
