"""adapter_config.json, typed: what the PEFT library writes, and what of it is honoured here.

Fields that change what the tensors mean and are not honoured are refused by name, those of a future
version of PEFT too, unless they hold what PEFT writes where an option is not used.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunefork.errors import AdapterError, ModelError
from tunefork.model.load import find
from tunefork.model.packaged import PACKAGED
from tunefork.recipe import LoraSection, ModelSection
from tunefork.registry.safe_read import check_folder, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

Name = Annotated[str, Field(min_length=1, max_length=512)]
Names = Annotated[list[Name], Field(max_length=20_000)]
Rank = Annotated[int, Field(ge=1, le=1 << 16)]
Positive = Annotated[float, Field(gt=0.0, le=1e6)]
Index = Annotated[int, Field(ge=0, lt=1 << 24)]
Indices = Annotated[list[Index], Field(max_length=1 << 20)]


class AdapterConfig(BaseModel):
    """The fields of peft.LoraConfig that are honoured, with PEFT's names and defaults."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: Positive
    target_modules: Names | Annotated[str, Field(min_length=1, max_length=4096)]
    exclude_modules: Names | str | None = None
    base_model_name_or_path: Annotated[str, Field(max_length=4096)] | None = None
    revision: Annotated[str, Field(max_length=256)] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[Name, Rank] | None = None
    alpha_pattern: dict[Name, Positive] | None = None
    layers_to_transform: Indices | Index | None = None
    layers_pattern: Names | str | None = None
    modules_to_save: Names | None = None
    trainable_token_indices: Indices | dict[Name, Indices] | None = None
    ensure_weight_tying: bool = False


_HARMLESS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # others change the base
}
"""Unused options that PEFT writes as something else than nothing."""
_FREE = (
    "peft_version",
    "auto_mapping",
    "runtime_config",
    "task_type",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
)
"""What changes nothing of a loaded adapter's logits."""


def read_config(folder: Path) -> AdapterConfig:
    """The adapter's configuration; refuses what this library cannot apply faithfully."""
    check_folder(folder, WEIGHTS)
    file = folder / CONFIG
    fields = read_json(file)
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{file}: peft_type is {_short(kind)}; only LORA is supported")
    for key in ("r", "lora_alpha", "target_modules"):
        if not fields.get(key):
            raise AdapterError(f"{file}: {key} is missing")
    known = AdapterConfig.model_fields
    for key, value in fields.items():
        if key in known or key in _FREE or value in (None, False, [], {}):
            continue
        if not any(
            value is v or (type(value) is str and value == v) for v in _HARMLESS.get(key, ())
        ):
            raise AdapterError(f"{file}: {key[:100]}={_short(value)} is not supported")
    try:
        return AdapterConfig.model_validate({k: v for k, v in fields.items() if k in known})
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        at = ".".join(map(str, first["loc"]))[:100]
        raise AdapterError(f"{file}: {at}: {first['msg']}") from error


def base_section(folder: Path) -> ModelSection:
    """The base that the adapter in `folder` names; raises AdapterError where it names none.

    A packaged model is found by its short name, on any machine, because the folder of a converted
    model bears the hash of its GGUF file.
    """
    config, file = read_config(folder), folder / CONFIG
    base = config.base_model_name_or_path
    if not base:
        raise AdapterError(f"{file}: base_model_name_or_path is missing")
    if "\0" in base or ".." in Path(base).parts:
        raise AdapterError(
            f"{file}: base_model_name_or_path climbs out of a folder ({_short(base)}); write the "
            "base's full path, or its hub id, there"
        )
    for name, packaged in PACKAGED.items():
        if Path(base).name == packaged.sha256:
            return ModelSection(id=name)
    return ModelSection(id=base, revision=config.revision)


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
        "use_dora": lora.dora,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": list(lora.modules_to_save) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def write_config(
    folder: Path,
    lora: LoraSection,
    *,
    base: str,
    revision: str | None,
    target_modules: list[str],
    modules_to_save: list[str],
    token_indices: dict[str, list[int]] | list[int] | None,
) -> None:
    """Write adapter_config.json as the PEFT library would.

    The base is written as what `from_pretrained` takes, so that others can load the adapter by
    itself: for a GGUF file or a packaged model that is the folder it was converted to.
    """
    config = adapter_settings(lora) | {
        "base_model_name_or_path": _loadable(base, revision),
        "revision": revision,
        "modules_to_save": modules_to_save or None,
        "trainable_token_indices": token_indices or None,
        "target_modules": target_modules,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _loadable(base: str, revision: str | None) -> str:
    """What transformers loads `base` from."""
    try:
        location = Path(find(ModelSection(id=base, revision=revision)).location)
    except ModelError:  # gone since it was loaded: no reason to lose what was trained on it
        return base
    return str(location.resolve()) if location.is_dir() else base


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
