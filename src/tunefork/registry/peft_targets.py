"""What an adapter's configuration means in one base, by the PEFT library's rules of matching.

The rules are those of peft 0.21: `check_target_module_exists`, `get_pattern_key`, `_set_trainable`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from tunefork.errors import AdapterError
from tunefork.model.build import linear_paths
from tunefork.model.whole import is_tied, path_of
from tunefork.registry.peft_config import CONFIG, AdapterConfig
from tunefork.registry.safe_regex import UnsafeRegexError, matches_fully


@dataclass(frozen=True, slots=True)
class Delta:
    """What the configuration says of one layer's delta."""

    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Targets:
    """Paths in one base."""

    deltas: dict[str, Delta]
    whole: list[str]
    """Modules that are saved whole."""
    rows: dict[str, list[int]]
    """Embedding or head -> the tokens of which it has rows of its own."""
    stays_tied: bool
    """Head and embedding share what the adapter says of one of them."""


def find(model: PreTrainedModel, config: AdapterConfig, folder: Path) -> Targets:
    """Raise AdapterError where the configuration names nothing, or what cannot be."""
    try:
        return _find(model, config)
    except (UnsafeRegexError, _MisfitError) as error:
        raise AdapterError(f"{folder / CONFIG}: {error}") from error


class _MisfitError(ValueError):
    """The message lacks the file's name."""


def _find(model: PreTrainedModel, config: AdapterConfig) -> Targets:
    tied, saved = is_tied(model), config.modules_to_save or []
    whole = [path for path, _ in model.named_modules() if path.endswith(tuple(saved))]
    for path in whole:
        if not any(True for _ in model.get_submodule(path).parameters(recurse=False)):
            raise _MisfitError(
                f"modules_to_save names {path}, a block of modules; only modules with weights of "
                "their own (embeddings, heads, norms, linear layers) are supported"
            )
    if saved and not whole:
        raise _MisfitError(f"modules_to_save={saved[:3]} names nothing in this base")
    ends = [path_of(model, m) for m in _ends(model)]
    stays_tied = tied and config.ensure_weight_tying
    if stays_tied and set(ends) & set(whole):
        whole = [*dict.fromkeys([*whole, *ends])]
    rows = _rows(model, config, ends, tied)
    if both := set(rows) & set(whole):
        raise _MisfitError(f"modules_to_save and trainable_token_indices both name {min(both)}")
    if tied and set(rows) == {ends[0]}:
        stays_tied = True
    return Targets(_deltas(model, config, whole), whole, rows, stays_tied)


def _deltas(model: PreTrainedModel, config: AdapterConfig, whole: list[str]) -> dict[str, Delta]:
    found = {}
    for path in linear_paths(model):
        if path in whole or not _is_target(path, config):
            continue
        rank = _pattern(config.rank_pattern, path, config.r)
        alpha = _pattern(config.alpha_pattern, path, config.lora_alpha)
        found[path] = Delta(int(rank), alpha / (rank**0.5 if config.use_rslora else rank))
    return found


def _is_target(path: str, config: AdapterConfig) -> bool:
    if config.exclude_modules and _names(path, config.exclude_modules):
        return False
    targets = config.target_modules
    if targets == "all-linear":
        return True
    if not _names(path, targets):
        return False
    if isinstance(targets, str) or path in targets or config.layers_to_transform in (None, []):
        return True
    layers = config.layers_to_transform
    index = _layer_index(path, config.layers_pattern or [])
    return index == layers if isinstance(layers, int) else index in (layers or [])


def _names(path: str, names: list[str] | str) -> bool:
    if isinstance(names, str):
        return matches_fully(names, path)
    return path in names or path.endswith(tuple("." + name for name in names))


def _layer_index(path: str, patterns: list[str] | str) -> int | None:
    """The number after the first name (or after one of `patterns`), as in `layers.7.`"""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        if not re.fullmatch(r"[\w.]+", pattern):
            raise _MisfitError("layers_pattern is supported for plain names only")
    parts = path.split(".")
    for at in range(1, len(parts) - 1):
        before = ".".join(parts[:at])
        is_named = any(before == p or before.endswith("." + p) for p in patterns)
        if parts[at].isdecimal() and (is_named if patterns else at >= 2):
            return int(parts[at])
    return None


def _pattern(
    patterns: dict[str, int] | dict[str, float] | None, path: str, default: float
) -> float:
    """The value of the first pattern that means `path`, or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if matches_fully(rf"(.*\.)?({pattern})", path):
            return value
    return default


def _rows(
    model: PreTrainedModel, config: AdapterConfig, ends: list[str], tied: bool
) -> dict[str, list[int]]:
    indices = config.trainable_token_indices
    if not indices:
        return {}
    rows: dict[str, list[int]] = {}
    for name, ids in ({ends[0]: indices} if isinstance(indices, list) else indices).items():
        named = [path for path in ends if path == name or path.endswith("." + name)]
        if len(named) != 1:
            raise _MisfitError(
                f"trainable_token_indices names {name[:100]}; only the embedding ({ends[0]}) and "
                f"the output head ({ends[1]}) are supported"
            )
        if not ids or len(set(ids)) < len(ids):
            raise _MisfitError("trainable_token_indices holds an empty list, or an index twice")
        rows[named[0]] = ids
    if tied and len(rows) == 2 and rows[ends[0]] == rows[ends[1]]:
        del rows[ends[1]]  # the head follows the embedding
    if tied and len(rows) == 2 and config.ensure_weight_tying:
        raise _MisfitError("ensure_weight_tying, but embedding and head train other tokens' rows")
    return rows


def _ends(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()
