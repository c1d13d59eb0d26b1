"""SHA-256 of what a model's configuration says that its weights do not: how they are computed with.

The same weights under another rotary base or another epsilon are another model, and every shape
fits. Only fields that change the logits are in it, by name, each with one form: what a file leaves
out counts as its default, so that neither a release of transformers that writes more fields nor one
that writes fewer changes the digest.
"""

import hashlib
import json
from typing import Any

_FIELDS = (
    # activations and norms
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "parallel_attn",
    "use_parallel_residual",
    # attention
    "num_attention_heads",
    "rotary_pct",
    "rotary_dim",
    "alibi",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "scale_attn_weights",
    "clip_qkv",
    "no_rope_layers",
    # scales of the residual stream and of the logits
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "final_logit_softcapping",
    # experts
    "num_experts_per_tok",
    "norm_topk_prob",
    "routed_scaling_factor",
    "scoring_func",
    "n_group",
    "topk_group",
)


def config_sha256(config: Any) -> str:
    """Digest of the fields of `config` (a `PretrainedConfig`) that change the logits."""
    text = config.get_text_config()
    found = {name: value for name in _FIELDS if (value := getattr(text, name, None)) is not None}
    heads = getattr(text, "num_attention_heads", None)
    if heads:
        found["kv_heads"] = getattr(text, "num_key_value_heads", None) or heads
        found["head_dim"] = getattr(text, "head_dim", None) or text.hidden_size // heads
    found["rope"] = _rope(text)
    found["window"] = _window(text)
    shown = json.dumps(_plain(found), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{config.model_type} {shown}".encode()).hexdigest()


def _rope(text: Any) -> dict[str, Any]:
    """The rotary embedding's parameters but for those that say nothing."""
    rope = dict(getattr(text, "rope_parameters", None) or {})
    rope.setdefault("partial_rotary_factor", getattr(text, "partial_rotary_factor", None))
    silent = {"rope_type": "default", "partial_rotary_factor": 1.0, "type": rope.get("rope_type")}
    return {k: v for k, v in rope.items() if v is not None and silent.get(k) != v}


def _window(text: Any) -> list[Any] | None:
    """Sliding-window attention: how wide and on which layers; None where it is off."""
    width = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or []
    is_off = not getattr(text, "use_sliding_window", True)
    if not width or is_off or (kinds and all(kind == "full_attention" for kind in kinds)):
        return None
    return [width, list(kinds)]


def _plain(value: Any) -> Any:
    """As JSON has it, a whole float as the integer, which files write either way."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
