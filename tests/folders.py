"""Models on disk as users have them, tiny: Hugging Face folders and a GGUF file."""

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.data.conftest import CHATML, SPECIAL, train_tokenizer
from tests.tiny import CONFIGS

EOS = "<|im_end|>"


def save_tokenizer(folder: Path) -> int:
    """Write the tests' tokenizer, with ChatML and pad = eos, to `folder`; returns its size."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(), eos_token=EOS, pad_token=EOS
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_model(folder: Path, name: str = "llama", *, seed: int = 0) -> Any:
    """Write a random model of architecture `name` and its tokenizer; returns the model."""
    config = copy.deepcopy(CONFIGS[name])
    config.vocab_size = save_tokenizer(folder)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model.eval()


def save_gguf(file: Path, *, leave_out: str = "") -> Any:
    """Write a random llama as llama.cpp does, but for one tensor; returns the model."""
    vocabulary = json.loads(train_tokenizer().to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = len(tokens)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])  # 3: control
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(tokens.index(EOS))  # transformers 5.17 cannot do without one
    writer.add_eos_token_id(tokens.index(EOS))
    writer.add_pad_token_id(tokens.index(EOS))
    writer.add_chat_template(CHATML)
    for name, tensor in _gguf_tensors(model):
        if name != leave_out:
            writer.add_tensor(name, tensor.detach().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _gguf_tensors(model: Any) -> list[tuple[str, Tensor]]:
    config = model.config
    tensors = [
        ("token_embd.weight", model.model.embed_tokens.weight),
        ("output_norm.weight", model.model.norm.weight),
    ]
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        named = {
            "attn_q": _interleave(attention.q_proj.weight, config.num_attention_heads),
            "attn_k": _interleave(attention.k_proj.weight, config.num_key_value_heads),
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "ffn_gate": mlp.gate_proj.weight,
            "ffn_up": mlp.up_proj.weight,
            "ffn_down": mlp.down_proj.weight,
            "attn_norm": layer.input_layernorm.weight,
            "ffn_norm": layer.post_attention_layernorm.weight,
        }
        tensors += [(f"blk.{index}.{name}.weight", tensor) for name, tensor in named.items()]
    return tensors


def _interleave(weight_od: Tensor, num_heads: int) -> Tensor:
    """llama.cpp's rotary turns neighbours, transformers' the two halves of a head."""
    size = weight_od.shape[0] // num_heads
    halves = weight_od.reshape(num_heads, 2, size // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight_od.shape)
