"""An adapter's two matrices a layer, read from its folder and written to another.

For what rearranges an adapter without its base: combining, padding, another dtype, LoRA GGUF. Only
plain LoRA tensors can be rearranged so; anything else in the file is refused by name.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tunefork.errors import AdapterError
from tunefork.registry.peft_format import CONFIG, WEIGHTS, read_config
from tunefork.registry.safe_read import read_header, read_json
from tunefork.registry.safe_tensors import read_tensors

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<which>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA deltas: R rank, D features in, O features out."""

    config: dict[str, Any]
    """adapter_config.json."""
    deltas: dict[str, tuple[Tensor, Tensor]]
    """Path of the layer in the base -> A (R, D), B (O, R)."""

    @property
    def rank(self) -> int:
        """R."""
        return int(self.config["r"])

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        alpha = float(self.config["lora_alpha"])
        return alpha / (self.rank**0.5 if self.config.get("use_rslora") else self.rank)


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`; raises AdapterError."""
    typed = read_config(folder)
    if typed.rank_pattern or typed.alpha_pattern:
        raise AdapterError(
            f"{folder / CONFIG}: rank_pattern and alpha_pattern give layers ranks of their own, "
            "which cannot be rearranged; merge the adapter into its base instead (tunefork merge)"
        )
    config, file = read_json(folder / CONFIG), folder / WEIGHTS
    tensors = read_tensors(file, read_header(file))
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{file}: {key} is no lora_A or lora_B, and only those can be rearranged; merge "
                "the adapter into its base instead (tunefork merge)"
            )
        halves.setdefault(match["path"], {})[match["which"]] = tensor
    for path, pair in halves.items():
        if len(pair) < 2:
            raise AdapterError(f"{file}: {path} has no lora_{'B' if 'A' in pair else 'A'}")
    return Adapter(config, {path: (pair["A"], pair["B"]) for path, pair in halves.items()})


def write_adapter(adapter: Adapter, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write `adapter` as PEFT does, its tensors in `dtype` (default: as they are)."""
    tensors = {}
    for path, pair in adapter.deltas.items():
        for which, tensor in zip("AB", pair, strict=True):
            name = f"base_model.model.{path}.lora_{which}.weight"
            tensors[name] = tensor.to(dtype or tensor.dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(adapter.config, indent=2) + "\n", encoding="utf-8")


def pad_rank(adapter: Adapter, rank: int) -> Adapter:
    """The same deltas at a higher `rank`: zero rows of A, zero columns of B, and the same scale."""
    more = rank - adapter.rank
    if more < 0:
        raise AdapterError(f"rank {adapter.rank} cannot be padded to {rank}, which is lower")
    growth = rank / adapter.rank
    alpha = adapter.config["lora_alpha"]
    alpha *= growth**0.5 if adapter.config.get("use_rslora") else growth
    deltas = {}
    for path, (a_rd, b_or) in adapter.deltas.items():
        zero_rd = a_rd.new_zeros(more, a_rd.shape[1])
        zero_or = b_or.new_zeros(b_or.shape[0], more)
        deltas[path] = (torch.cat([a_rd, zero_rd]), torch.cat([b_or, zero_or], dim=1))
    return Adapter({**adapter.config, "r": rank, "lora_alpha": alpha}, deltas)
