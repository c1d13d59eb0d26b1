"""LoRA adapters on disk, exactly as the PEFT library writes and reads them.

    adapter_model.safetensors   base_model.model.<path>.lora_A.weight (R, D), .lora_B.weight (O, R)
    adapter_config.json         peft.LoraConfig's fields

A dead adapter is an error, never a silent no-op: keys that are missing or left over, shapes that do
not fit, values that are not finite, and a B that is zero everywhere are each refused by name.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tunefork.errors import AdapterError, ModelError
from tunefork.model.build import find_targets, replace
from tunefork.model.linear import LoraLinear
from tunefork.model.load import find
from tunefork.model.packaged import PACKAGED
from tunefork.recipe import LoraSection, ModelSection

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<which>[AB])\.weight")

_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
}
"""Settings that change what the tensors mean -> the values under which they do not."""


def save_adapter(
    model: PreTrainedModel,
    folder: Path,
    lora: LoraSection,
    *,
    base: str,
    revision: str | None = None,
) -> None:
    """Write `model`'s deltas to `folder`; `base` and `revision` are those of the recipe's model.

    The base is written as what `from_pretrained` takes, so that others can load the adapter by
    itself: for a GGUF file or a packaged model that is the folder it was converted to.
    """
    layers = dict(_lora_layers(model))
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_a.detach().cpu()
        tensors[f"base_model.model.{path}.lora_B.weight"] = layer.lora_b.detach().cpu()
    config: dict[str, Any] = {
        **adapter_settings(lora),
        "base_model_name_or_path": _loadable(base, revision),
        "revision": revision,
        "target_modules": _shortest_names(model, list(layers)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adapter_settings(lora: LoraSection) -> dict[str, Any]:
    """What adapter_config.json says of every adapter that `lora` trains, whatever its base."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.scaling == "rslora",
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapter in `folder` on the base `model`, in place and frozen.

    Raises AdapterError, naming file and key, for anything that would not be what was trained.
    """
    config = read_config(folder)
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    weights = folder / WEIGHTS
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{weights}: cannot be read: {error}") from error
    deltas = _pair(tensors, weights)
    targeted = _targeted(model, config, folder)
    if missing := sorted(targeted - deltas.keys()):
        raise AdapterError(
            f"{weights}: no tensors for {_some(missing)}, which {CONFIG} targets in this base; the "
            "adapter belongs to another base, or was saved under other names"
        )
    if extra := sorted(deltas.keys() - targeted):
        raise AdapterError(
            f"{weights}: holds tensors for {_some(extra)}, which this base does not have or "
            f"{CONFIG} does not target; the adapter belongs to another base"
        )
    if not any(bool(b_or.any()) for _, b_or in deltas.values()):
        raise AdapterError(f"{weights}: every lora_B is zero: the adapter would change nothing")
    model.requires_grad_(False)
    for path, (a_rd, b_or) in deltas.items():
        layer = LoraLinear(model.get_submodule(path), rank=rank, scale=scale, dropout=0.0)
        for parameter, tensor, name in ((layer.lora_a, a_rd, "A"), (layer.lora_b, b_or, "B")):
            if parameter.shape != tensor.shape:
                raise AdapterError(
                    f"{weights}: {path}.lora_{name} has shape {tuple(tensor.shape)}, but this base "
                    f"and r={rank} need {tuple(parameter.shape)}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterError(f"{weights}: {path}.lora_{name} holds NaN or infinite values")
            parameter.data.copy_(tensor)
        replace(model, path, layer.requires_grad_(False))


def _loadable(base: str, revision: str | None) -> str:
    """What transformers loads `base` from."""
    try:
        location = Path(find(ModelSection(id=base, revision=revision)).location)
    except ModelError:  # gone since it was loaded: no reason to lose what was trained on it
        return base
    return str(location.resolve()) if location.is_dir() else base


def base_section(folder: Path) -> ModelSection:
    """The base that the adapter in `folder` names; raises AdapterError where it names none.

    A packaged model is found by its short name, on any machine, because the folder of a converted
    model bears the hash of its GGUF file.
    """
    config = read_config(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        raise AdapterError(f"{folder / CONFIG}: base_model_name_or_path is missing")
    for name, packaged in PACKAGED.items():
        if Path(base).name == packaged.sha256:
            return ModelSection(id=name)
    return ModelSection(id=base, revision=config.get("revision"))


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration; refuses what this library cannot apply faithfully."""
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file}: must hold a JSON object")
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{file}: peft_type is {config.get('peft_type')!r}; only LORA is supported"
        )
    for key in ("r", "lora_alpha", "target_modules"):
        if not config.get(key):
            raise AdapterError(f"{file}: {key} is missing")
    for key, harmless in _REFUSED.items():
        if config.get(key) not in harmless:
            raise AdapterError(f"{file}: {key}={config[key]!r} is not supported")
    return config


def _lora_layers(model: PreTrainedModel) -> Iterable[tuple[str, LoraLinear]]:
    return ((p, m) for p, m in model.named_modules() if isinstance(m, LoraLinear))


def _pair(tensors: dict[str, Tensor], weights: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensors by layer path: (A, B). Raises AdapterError for a key that is no LoRA key."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"{weights}: unexpected key {key}")
        halves.setdefault(match["path"], {})[match["which"]] = tensor
    for path, pair in halves.items():
        if len(pair) < 2:
            raise AdapterError(f"{weights}: {path} has no lora_{'B' if 'A' in pair else 'A'}")
    return {path: (pair["A"], pair["B"]) for path, pair in halves.items()}


def _targeted(model: PreTrainedModel, config: dict[str, Any], folder: Path) -> set[str]:
    """Paths that the configuration's target_modules name in this base, by PEFT's rules."""
    targets = config["target_modules"]
    excluded = config.get("exclude_modules") or []
    if excluded:
        raise AdapterError(f"{folder / CONFIG}: exclude_modules={excluded!r} is not supported")
    linear = find_targets(model, tuple(_last_names(model)))
    if isinstance(targets, str):
        if targets == "all-linear":
            return set(linear)
        return {path for path in linear if re.fullmatch(targets, path)}
    return {p for p in linear if any(p == t or p.endswith("." + t) for t in targets)}


def _last_names(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return sorted(
        {
            path.rpartition(".")[2]
            for path, module in model.named_modules()
            if hasattr(module, "in_features") and module is not head
        }
    )


def _shortest_names(model: PreTrainedModel, paths: list[str]) -> list[str]:
    """`q_proj` where every layer of that name has a delta, else the full path."""
    adapted = set(paths)
    names = {path.rpartition(".")[2] for path in paths}
    whole = {
        name
        for name in names
        if all(
            path in adapted
            for path, module in model.named_modules()
            if path.rpartition(".")[2] == name and hasattr(module, "in_features")
        )
    }
    return sorted({n if (n := p.rpartition(".")[2]) in whole else p for p in paths})


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more
