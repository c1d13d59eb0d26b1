"""Tiny random models of five architectures, built in the test: no file, no network."""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)

VOCABULARY = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_COMMON, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_COMMON, num_key_value_heads=2, head_dim=8),
    "gemma3": Gemma3TextConfig(
        **_COMMON,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": Phi3Config(**_COMMON, num_key_value_heads=2),
    "gpt_neox": GPTNeoXConfig(**_COMMON),
}


def tiny_model(name: str = "llama", *, seed: int = 0, **options: Any) -> Any:
    """A random causal LM of architecture `name`, fp32, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), **options)
    for parameter in model.parameters():  # norms start at one: make every weight matter
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()
