"""LoRA and DoRA adapters on disk, exactly as the PEFT library writes and reads them.

    adapter_model.safetensors   base_model.model.<path>...
                                .lora_A.weight (R, D), .lora_B.weight (O, R)
                                .lora_magnitude_vector (O,)                 DoRA
                                .weight, .bias                              modules_to_save
                                .token_adapter.trainable_tokens_delta (N, D)
    adapter_config.json         peft.LoraConfig's fields: `peft_config.py`

A dead adapter is an error, never a silent no-op: keys that are missing or left over, shapes that do
not fit, values that are not finite, and tensors that change nothing are each refused by name. So is
a hostile one: `safe_read.py`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.errors import AdapterError
from tunefork.model.build import replace
from tunefork.model.dora import DoraLinear
from tunefork.model.linear import LoraLinear
from tunefork.model.tokens import TokenEmbedding, TokenHead, grow, token_embedding, token_head
from tunefork.model.whole import is_tied, train_whole
from tunefork.registry import peft_targets
from tunefork.registry.peft_config import (
    CONFIG,
    WEIGHTS,
    AdapterConfig,
    adapter_settings,
    base_section,
    read_config,
)
from tunefork.registry.peft_save import PREFIX, ROWS, save_adapter
from tunefork.registry.peft_targets import Targets
from tunefork.registry.safe_read import Entry, read_header
from tunefork.registry.safe_tensors import read_tensors

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "adapter_settings",
    "base_section",
    "check_fits",
    "load_adapter",
    "read_config",
    "save_adapter",
]

_MOST_NEW_TOKENS = 1 << 16


def load_adapter(model: PreTrainedModel, folder: Path) -> bool:
    """Put the adapter in `folder` on the base `model`, in place and frozen.

    Returns whether it brought tokens of its own, for which the vocabulary was enlarged. Raises
    AdapterError, naming file and key, for anything that would not be what was trained; the model
    is then of no further use.
    """
    config = read_config(folder)
    file = folder / WEIGHTS
    header = read_header(file)
    targets = peft_targets.find(model, config, folder)
    num_tokens = model.get_input_embeddings().num_embeddings
    has_grown = _grow(model, targets, header, file)
    check_header(header, expected_shapes(model, config, targets), file)
    tensors = {k.removeprefix(PREFIX): t for k, t in read_tensors(file, header).items()}
    _check_alive(model, tensors, targets, file, num_tokens)
    model.requires_grad_(False)
    _put_deltas(model, config, targets, tensors)
    _put_whole(model, targets, tensors, file)
    _put_rows(model, targets, tensors)
    model.requires_grad_(False)
    return has_grown


def check_fits(model: PreTrainedModel, folder: Path) -> Targets:
    """What `load_adapter` would change of `model`, which may lie on the meta device.

    Reads the file's header alone. Raises AdapterError where keys or shapes do not fit.
    """
    config, header = read_config(folder), read_header(folder / WEIGHTS)
    targets = peft_targets.find(model, config, folder)
    check_header(header, expected_shapes(model, config, targets), folder / WEIGHTS)
    return targets


def _grow(model: PreTrainedModel, targets: Targets, header: dict[str, Entry], file: Path) -> bool:
    """Make room for the tokens that the adapter has rows of and the base has not."""
    embedding = model.get_input_embeddings()
    ends = {
        p: m for p, m in model.named_modules() if m in (embedding, model.get_output_embeddings())
    }
    wanted = [max(ids) + 1 for ids in targets.rows.values()]
    for path in targets.whole:
        entry = header.get(f"{PREFIX}{path}.weight")
        if path in ends and entry is not None and entry.shape:
            wanted.append(entry.shape[0])
    has, needs = embedding.num_embeddings, max(wanted, default=0)
    if needs <= has:
        return False
    if needs > has + _MOST_NEW_TOKENS:
        raise AdapterError(
            f"{file}: is for {needs:,} tokens, and this base has {has:,}; at most "
            f"{_MOST_NEW_TOKENS:,} can have been added, so it belongs to another base"
        )
    grow(model, range(has, needs))
    return True


def expected_shapes(
    model: PreTrainedModel, config: AdapterConfig, targets: Targets
) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor that the adapter must hold, and no other."""
    shapes: dict[str, tuple[int, ...]] = {}
    modules: dict[str, Any] = dict(model.named_modules())
    for path, delta in targets.deltas.items():
        layer = modules[path]
        features_in, features_out = int(layer.in_features), int(layer.out_features)
        shapes[f"{path}.lora_A.weight"] = (delta.rank, features_in)
        shapes[f"{path}.lora_B.weight"] = (features_out, delta.rank)
        if config.use_dora:
            shapes[f"{path}.lora_magnitude_vector"] = (features_out,)
    for path in targets.whole:
        for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
            shapes[f"{path}.{name}"] = tuple(parameter.shape)
    width = model.get_input_embeddings().embedding_dim
    for path, ids in targets.rows.items():
        shapes[path + ROWS] = (len(ids), width)
    return {PREFIX + key: shape for key, shape in shapes.items()}


def check_header(
    header: dict[str, Entry], expected: dict[str, tuple[int, ...]], file: Path
) -> None:
    """Raise AdapterError unless the file holds just the tensors that the base asks for."""
    if missing := [key for key in expected if key not in header]:
        raise AdapterError(
            f"{file}: no tensors for {_some(missing)}, which {CONFIG} names in this base; the "
            "adapter belongs to another base, or was saved under other names"
        )
    if extra := [key for key in header if key not in expected]:
        raise AdapterError(
            f"{file}: unexpected key {_some(extra)}, which this base does not have or {CONFIG} "
            "does not name; the adapter belongs to another base"
        )
    for key, shape in expected.items():
        if header[key].shape != shape:
            raise AdapterError(
                f"{file}: {_bare(key)} has shape {header[key].shape}, but this base and {CONFIG} "
                f"need {shape}"
            )


def _check_alive(
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    targets: Targets,
    file: Path,
    num_tokens: int,
) -> None:
    """Raise AdapterError where not one tensor changes the base."""
    if targets.rows or any(bool(t.any()) for k, t in tensors.items() if ".lora_B." in k):
        return
    for path in targets.whole:
        for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
            loaded = tensors[f"{path}.{name}"].to(parameter.device, parameter.dtype)
            if not torch.equal(loaded[:num_tokens], parameter.detach()[:num_tokens]):
                return
    for path in targets.deltas:
        length = tensors.get(f"{path}.lora_magnitude_vector")
        if length is None:
            break
        base = LoraLinear(model.get_submodule(path), rank=1, scale=1.0, dropout=0.0)
        own = base.materialize().float().norm(dim=1)
        if not torch.allclose(length.to(own), own, rtol=1e-2):  # a bf16 norm's rounding
            return
    raise AdapterError(
        f"{file}: every lora_B is zero"
        + (", and what is saved whole equals the base" if targets.whole else "")
        + ": the adapter would change nothing"
    )


def _put_deltas(
    model: PreTrainedModel, config: AdapterConfig, targets: Targets, tensors: dict[str, Tensor]
) -> None:
    kind = DoraLinear if config.use_dora else LoraLinear
    for path, delta in targets.deltas.items():
        base = model.get_submodule(path)
        layer = kind(base, rank=delta.rank, scale=delta.scale, dropout=0.0)
        layer.lora_a.data.copy_(tensors[f"{path}.lora_A.weight"])
        layer.lora_b.data.copy_(tensors[f"{path}.lora_B.weight"])
        if isinstance(layer, DoraLinear):
            layer.magnitude.data.copy_(tensors[f"{path}.lora_magnitude_vector"])
        replace(model, path, layer)


def _put_whole(
    model: PreTrainedModel, targets: Targets, tensors: dict[str, Tensor], file: Path
) -> None:
    if not targets.stays_tied:
        train_whole(model, targets.whole)  # unties what is no longer the same
    seen: dict[nn.Parameter, Tensor] = {}
    for path in targets.whole:
        for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
            loaded = tensors[f"{path}.{name}"]
            if parameter in seen and not torch.equal(seen[parameter], loaded):
                raise AdapterError(
                    f"{file}: {path}.{name} differs from the embedding, but {CONFIG} has "
                    "ensure_weight_tying; it was not saved by the PEFT library"
                )
            seen[parameter] = loaded
            parameter.data.copy_(loaded)


def _put_rows(model: PreTrainedModel, targets: Targets, tensors: dict[str, Tensor]) -> None:
    was_tied, embedding = is_tied(model), model.get_input_embeddings()
    ends = {
        p: m for p, m in model.named_modules() if m in (embedding, model.get_output_embeddings())
    }
    for path, ids in targets.rows.items():
        if ends[path] is embedding:
            module: TokenEmbedding | TokenHead = token_embedding(model, ids)
            if was_tied and len(targets.rows) == 1:
                token_head(model, ids, module.rows)
        else:
            module = token_head(model, ids)
        module.rows.data.copy_(tensors[path + ROWS])


def _bare(key: str) -> str:
    return key.removeprefix(PREFIX).removesuffix(".weight")


def _some(keys: Iterable[str]) -> str:
    names = list(dict.fromkeys(_bare(key)[:200] for key in keys))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
