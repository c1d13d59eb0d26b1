"""How two versions differ: where they come from, how they are configured, and what they do.

What an adapter does to a layer is its delta s B A (O, D), which is never made: with thin QR
factors B = Q_b R_b and A^T = Q_a R_a, orthonormal Q drop out of the Frobenius norm, so

    || s B A ||_F = || s R_b R_a^T ||_F                                 R x R

and a difference of two deltas is one delta of rank R1 + R2: [s1 B1, -s2 B2] [A1; A2]. The Gram
matrices (tr(B^T B A A^T)) give the same, but lose half of the digits where two deltas nearly agree.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tunefork.registry.intake import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunefork.registry.objects import StoredFile
from tunefork.registry.store import Store
from tunefork.registry.version import Details, Version

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<which>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LayerChange:
    """A layer's delta in two adapters."""

    layer: str
    a_norm: float | None
    """Frobenius norm of its delta in the first; None where it has none there."""
    b_norm: float | None
    change: float | None
    """|| delta_a - delta_b || / || delta_a ||; None where either has no delta or a's is zero."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What is not the same in two versions; empty where all is."""

    a: Version
    b: Version
    lineage: dict[str, tuple[Any, Any]]
    """Base, fingerprints, method, data hash, parent; recipe fields as `recipe.lora.rank`."""
    config: dict[str, tuple[Any, Any]]
    """Fields of adapter_config.json or config.json."""
    files: dict[str, tuple[str | None, str | None]]
    """Files whose content differs: their sha256, None where a version has none."""
    layers: tuple[LayerChange, ...]
    """LoRA layers whose tensors differ, the most changed first."""
    other_tensors: tuple[str, ...]
    """Other tensors of the adapters that differ, or that only one has."""


def diff(store: Store, a: str, b: str) -> Difference:
    """Compare two versions. Raises StoreError where either is unknown."""
    first, second = store.show(a), store.show(b)
    files = _changed(_hashes(first.files), _hashes(second.files))
    folders = first.version.folder(), second.version.folder()
    layers: tuple[LayerChange, ...] = ()
    others: tuple[str, ...] = ()
    if files and all((folder / ADAPTER_WEIGHTS).is_file() for folder in folders):
        layers, others = _compare_weights(*folders)
    return Difference(
        a=first.version,
        b=second.version,
        lineage=_changed(_lineage(first), _lineage(second)),
        config=_changed(*(_config(folder) for folder in folders)),
        files={path: (pair[0] or None, pair[1] or None) for path, pair in files.items()},
        layers=layers,
        other_tensors=others,
    )


def delta_norm(a_rd: Tensor, b_or: Tensor) -> float:
    """|| B A ||_F in float64, without the (O, D) product."""
    r_b = torch.linalg.qr(b_or.double(), mode="r").R
    r_a = torch.linalg.qr(a_rd.double().T, mode="r").R
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


def _compare_weights(first: Path, second: Path) -> tuple[tuple[LayerChange, ...], tuple[str, ...]]:
    """Layers and other tensors that differ; one layer's tensors are in memory at a time."""
    found: list[LayerChange] = []
    configs = _config(first), _config(second)
    with (
        safe_open(first / ADAPTER_WEIGHTS, framework="pt") as a,
        safe_open(second / ADAPTER_WEIGHTS, framework="pt") as b,
    ):
        keys = [set(file.keys()) for file in (a, b)]
        layers = sorted(
            {match["path"] for match in map(_KEY.fullmatch, keys[0] | keys[1]) if match}
        )
        for layer in layers:
            names = [f"base_model.model.{layer}.lora_{which}.weight" for which in "AB"]
            pairs = [
                _scaled([file.get_tensor(name) for name in names], layer, config)
                if have.issuperset(names)
                else None
                for file, have, config in zip((a, b), keys, configs, strict=True)
            ]
            change = _layer_change(layer, *pairs)
            if change is not None:
                found.append(change)
        rest = sorted(key for key in keys[0] | keys[1] if not _KEY.fullmatch(key))
        others = tuple(
            key
            for key in rest
            if not (key in keys[0] & keys[1] and _same(a.get_tensor(key), b.get_tensor(key)))
        )
    found.sort(key=lambda c: -(torch.inf if c.change is None else c.change))
    return tuple(found), others


def _layer_change(
    layer: str, a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor] | None
) -> LayerChange | None:
    if a is not None and b is not None and all(map(_same, a, b)):
        return None
    norms = [None if pair is None else delta_norm(*pair) for pair in (a, b)]
    change = None
    if a is not None and b is not None and norms[0] and _same_size(a, b):
        joint = torch.cat([a[0], b[0]]), torch.cat([a[1], -b[1]], dim=1)
        change = delta_norm(*joint) / norms[0]
    return LayerChange(layer, norms[0], norms[1], change)


def _scaled(pair: list[Tensor], layer: str, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A, and B times the scale that the configuration gives it, by PEFT's rules."""
    a_rd, b_or = (tensor.double() for tensor in pair)
    rank, alpha = a_rd.shape[0], float(config.get("lora_alpha") or 0)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if layer == pattern or layer.endswith(f".{pattern}"):
            alpha = float(own)
    return a_rd, b_or * (alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _same_size(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return a[0].shape[1] == b[0].shape[1] and a[1].shape[0] == b[1].shape[0]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _hashes(files: tuple[StoredFile, ...]) -> dict[str, str | None]:
    return {file.path: file.sha256 for file in files}


def _lineage(details: Details) -> dict[str, Any]:
    told = details.lineage.model_dump(exclude={"recipe", "created", "metrics", "identity"})
    recipe = dict(_flat("recipe", details.lineage.recipe or {}))
    return told | details.identity | {"base": details.version.base} | recipe


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif value != {}:
        yield name, value


def _config(folder: Path) -> dict[str, Any]:
    for name in (ADAPTER_CONFIG, "config.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
    return {}


def _changed(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ: both values, None where there is none."""
    keys = [*a, *(key for key in b if key not in a)]
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}
