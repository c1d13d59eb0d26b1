"""Tiny models for packed attention: those that take segments and those that must be found out."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DeepseekV3Config,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from tests.tiny import CONFIGS
from tunefork.model.attention import NAME, register

_SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

TAKE: dict[str, PretrainedConfig] = CONFIGS | {
    "qwen2": Qwen2Config(
        **_GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3_moe": Qwen3MoeConfig(**_GROUPED, **_EXPERTS, head_dim=8, num_experts=4),
    "mistral": MistralConfig(**_GROUPED, sliding_window=4),
    "cohere2": Cohere2Config(**_GROUPED, sliding_window=4),
    "gemma2 without soft-capping": Gemma2Config(
        **_GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=None
    ),
}

REFUSE: dict[str, PretrainedConfig] = {
    "soft-capping": Gemma2Config(
        **_GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=5.0
    ),
    "attention sinks": GptOssConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "chunks": Llama4TextConfig(
        **_GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48
    ),
    "values of another size": DeepseekV3Config(
        **_SHAPE,
        **_EXPERTS,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "a recurrent state beside attention": FalconH1Config(
        **_GROUPED,
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
    ),
    "heads of 12 features": LlamaConfig(**_GROUPED, head_dim=12),
    "dropout in attention": LlamaConfig(**_GROUPED, attention_dropout=0.1),
    "keywords are not handed on": OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, attention_dropout=0.0,
    ),
    "dropout of 0.1 (GPT-2)": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4),
}  # fmt: skip


def made(config: PretrainedConfig) -> Any:
    """A random model of `config` with our attention, in eval mode."""
    register()
    torch.manual_seed(0)
    config = type(config).from_dict(config.to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()
