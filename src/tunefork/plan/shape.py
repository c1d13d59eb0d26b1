"""A model as its configuration alone: its layers and shapes on the meta device, at any depth.

Where only a number of parameters is known, a Llama-like configuration of about that size stands for
the model; its shapes are those of well-known models of that family.
"""

import copy
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tunefork.errors import BadInputError, ModelError
from tunefork.model.build import find_targets
from tunefork.model.load import load_config
from tunefork.recipe import LoraSection, ModelSection

_LLAMA_LIKE = (
    # parameters, width, MLP width, layers, heads, key-value heads, vocabulary, tied embeddings
    (0.1345e9, 576, 1536, 30, 9, 3, 49_152, True),  # SmolLM2-135M
    (0.3618e9, 960, 2560, 32, 15, 5, 49_152, True),  # SmolLM2-360M
    (1.236e9, 2048, 8192, 16, 32, 8, 128_256, True),  # Llama-3.2-1B
    (3.213e9, 3072, 8192, 28, 24, 8, 128_256, True),  # Llama-3.2-3B
    (8.030e9, 4096, 14_336, 32, 32, 8, 128_256, False),  # Llama-3.1-8B
    (13.02e9, 5120, 13_824, 40, 40, 40, 32_000, False),  # Llama-2-13B
    (32.5e9, 5120, 25_600, 64, 64, 8, 151_936, False),  # as Qwen3-32B
    (70.55e9, 8192, 28_672, 80, 64, 8, 128_256, False),  # Llama-3.1-70B
    (405.9e9, 16_384, 53_248, 126, 128, 8, 128_256, False),  # Llama-3.1-405B
)


def config_for(model: ModelSection | float) -> Any:
    """The transformers configuration of a model, or of a Llama of about so many parameters.

    Raises ModelError where a configuration cannot be read or is none of a decoder-only model.
    """
    return load_config(model) if isinstance(model, ModelSection) else _llama_like(model)


def _llama_like(params: float) -> LlamaConfig:
    """The nearest of the known shapes, its depth adapted to the number of parameters."""
    if not 1e7 <= params <= 2e12:
        raise ModelError(
            f"model_params: {params:g} is not within 1e7 to 2e12; give the number of parameters, "
            "for example 8e9"
        )
    known = min(_LLAMA_LIKE, key=lambda row: abs(row[0] / params - 1) + abs(params / row[0] - 1))
    _, width, mlp, layers, heads, kv_heads, vocabulary, is_tied = known
    embeddings = vocabulary * width * (1 if is_tied else 2)
    head_dim = width // heads
    layer = width * head_dim * (2 * heads + 2 * kv_heads) + 3 * width * mlp + 2 * width
    layers = max(1, round((params - embeddings) / layer)) if params != known[0] else layers
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=is_tied,
        max_position_embeddings=131_072,
    )


def num_layers(config: Any) -> int:
    """Decoder layers of the model."""
    return int(config.get_text_config().num_hidden_layers)


def depths(config: Any) -> tuple[int, int]:
    """Two depths from which the whole can be extrapolated, or twice its own where it is shallow.

    Where kinds of layers alternate (Gemma 3: five local ones, one global), both end like the whole
    does and differ by one period.
    """
    whole, period = num_layers(config), _period(config)
    # Five, so that three lie between the first layer and the last: what one of them still holds of
    # the two before it (offloading, `shelf.IN_FLIGHT`) is seen.
    low = -(-5 // period) * period + whole % period
    return (whole, whole) if low + period >= whole else (low, low + period)


def _period(config: Any) -> int:
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["same"]
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[at % period] for at, kind in enumerate(kinds)):
            return period
    return len(kinds)


def at_depth(config: Any, depth: int) -> Any:
    """The same configuration with `depth` decoder layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = depth
    if kinds and len(text.layer_types) != depth:  # some derive it from the depth themselves
        text.layer_types = list(kinds[:depth])
    return config


class PlanError(BadInputError):
    """The model's code does not run without numbers, so nothing can be said of it."""


@contextmanager
def traceable(config: Any) -> Iterator[None]:
    """Turn what an architecture's own code raises on the meta device into a PlanError."""
    try:
        yield
    except BadInputError:
        raise
    except Exception as error:  # any model's code, which may need real numbers
        why = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise PlanError(
            f"a {config.model_type} model cannot be traced without its weights "
            f"({type(error).__name__}: {why}), so it cannot be planned"
        ) from error


def on_meta(config: Any, *, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The model on the meta device, in `dtype`."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    return model


def count_params(config: Any) -> int:
    """Parameters of the whole model, tied ones once; counted once a process. Raises PlanError."""
    key = config.to_json_string()
    if key not in _COUNTED:
        _COUNTED[key] = _extrapolated(
            config, lambda model: sum(p.numel() for p in model.parameters())
        )
    return _COUNTED[key]


_COUNTED: dict[str, int] = {}


def lora_params(config: Any, lora: LoraSection) -> int:
    """Parameters that `lora` trains in the whole model; layers are looked for once a process."""

    def of_rank_1(model: PreTrainedModel) -> int:
        layers = [model.get_submodule(path) for path in find_targets(model, lora.targets)]
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        return sum(layer.in_features + layer.out_features for layer in linear)

    key = (config.to_json_string(), lora.targets)
    if key not in _OF_RANK_1:
        _OF_RANK_1[key] = _extrapolated(config, of_rank_1)
    return lora.rank * _OF_RANK_1[key]


_OF_RANK_1: dict[Any, int] = {}


def _extrapolated(config: Any, measure: Any) -> int:
    low, high = depths(config)
    with traceable(config):
        at = {
            depth: measure(on_meta(at_depth(config, depth), dtype=torch.bfloat16))
            for depth in {low, high}
        }
    return extrapolate(at[low], at[high], config)


def extrapolate(at_low: float, at_high: float, config: Any) -> int:
    """What is linear in depth, at the model's own depth, from `depths`."""
    low, high = depths(config)
    if low == high:
        return round(at_high)
    return round(at_high + (at_high - at_low) * (num_layers(config) - high) / (high - low))
