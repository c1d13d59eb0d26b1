"""What serving is measured on: a base with random weights and adapters for it, in PEFT's files."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from benchmarks.training_runs import Shape
from tunefork.model.device import pick_device
from tunefork.serve.engine import ServedAdapter


def save_base(folder: Path, shape: Shape) -> None:
    """A folder with a configuration and a tokenizer; `random_weights` stands for the weights."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.width // shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=1,
    ).save_pretrained(folder)
    vocabulary = {f"t{at}": at for at in range(shape.vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1").save_pretrained(folder)


@contextmanager
def random_weights() -> Iterator[None]:
    """Within, an engine's base gets random weights on its device: nothing is read from a disk."""

    def load(section: Any, *, dtype: Any, device: Any, in_host_memory: bool = False) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        del in_host_memory
        torch.manual_seed(0)
        with torch.device(device):
            config = AutoConfig.from_pretrained(section.id)
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    with patch("tunefork.serve.engines.base.load_model", load):
        yield


def save_adapters(folder: Path, shape: Shape, number: int, rank: int) -> list[ServedAdapter]:
    """Random adapters of `rank` on all linear layers, bf16; those that are there are kept."""
    found = []
    for at in range(number):
        own = folder / str(at)
        if not (own / "adapter_config.json").exists():
            _save(own, shape, rank, seed=at)
        size = (own / "adapter_model.safetensors").stat().st_size
        found.append(ServedAdapter(f"a{at}:v1", own, rank, size))
    return found


def many(adapters: list[ServedAdapter], number: int, folder: Path) -> list[ServedAdapter]:
    """`number` adapters, each with a folder of its own, whose files are those of `adapters`."""
    found = []
    for at in range(number):
        source, own = adapters[at % len(adapters)], folder / f"m{at}"
        own.mkdir(parents=True, exist_ok=True)
        for file in source.folder.iterdir():
            if not (own / file.name).exists():
                os.link(file, own / file.name)
        found.append(ServedAdapter(f"m{at}:v1", own, source.rank, source.bytes))
    return found


def _save(folder: Path, shape: Shape, rank: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    device = pick_device()  # drawing a billion numbers takes a CPU half a minute
    random = torch.Generator(device).manual_seed(seed)
    kv = shape.width // shape.heads * shape.kv_heads
    sizes = {
        "self_attn.q_proj": (shape.width, shape.width),
        "self_attn.k_proj": (shape.width, kv),
        "self_attn.v_proj": (shape.width, kv),
        "self_attn.o_proj": (shape.width, shape.width),
        "mlp.gate_proj": (shape.width, shape.mlp),
        "mlp.up_proj": (shape.width, shape.mlp),
        "mlp.down_proj": (shape.mlp, shape.width),
    }

    def draw(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=random, device=device) * 0.01).bfloat16().cpu()

    tensors = {}
    for layer in range(shape.layers):
        for name, (wide, out) in sizes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = draw(rank, wide)
            tensors[f"{key}.lora_B.weight"] = draw(out, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [name.rpartition(".")[2] for name in sizes],
        "base_model_name_or_path": "random",
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
