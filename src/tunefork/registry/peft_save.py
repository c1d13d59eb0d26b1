"""What was trained, written as the PEFT library writes it; the keys are `peft_format.py`'s."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tunefork.model.dora import Delta, DoraLinear
from tunefork.model.tokens import TokenEmbedding, TokenHead
from tunefork.recipe import LoraSection
from tunefork.registry.peft_config import WEIGHTS, write_config

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"


def save_adapter(
    model: PreTrainedModel,
    folder: Path,
    lora: LoraSection,
    *,
    base: str,
    revision: str | None = None,
) -> None:
    """Write what was trained of `model`; `base` and `revision` are those of the recipe's model."""
    layers = {p: m for p, m in model.named_modules() if isinstance(m, Delta)}
    rows = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, TokenEmbedding)
        or (isinstance(module, TokenHead) and not module.is_shared)
    }
    whole = _whole(model)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors[f"{path}.lora_A.weight"] = layer.lora_a
        tensors[f"{path}.lora_B.weight"] = layer.lora_b
        if isinstance(layer, DoraLinear):
            tensors[f"{path}.lora_magnitude_vector"] = layer.magnitude
    for path in whole:
        for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
            tensors[f"{path}.{name}"] = parameter
    for path, module in rows.items():
        tensors[path + ROWS] = module.rows
    _write(tensors, folder)
    write_config(
        folder,
        lora,
        base=base,
        revision=revision,
        target_modules=_shortest_names(model, list(layers)),
        modules_to_save=_shortest_ends(model, whole),
        token_indices={path.rpartition(".")[2]: module.ids for path, module in rows.items()},
    )


def save_deltas(
    model: PreTrainedModel,
    folder: Path,
    lora: LoraSection,
    deltas: Mapping[str, tuple[Tensor, Tensor]],
    *,
    base: str,
    revision: str | None = None,
) -> None:
    """Write one adapter of a bank over `model`: A (R, D) and B (O, R) by path (`Bank.adapter`).

    The files are those of `save_adapter` for the same adapter alone.
    """
    tensors = {}
    for path, (lora_a, lora_b) in deltas.items():
        tensors[f"{path}.lora_A.weight"] = lora_a
        tensors[f"{path}.lora_B.weight"] = lora_b
    _write(tensors, folder)
    write_config(
        folder,
        lora,
        base=base,
        revision=revision,
        target_modules=_shortest_names(model, list(deltas)),
        modules_to_save=[],
        token_indices={},
    )


def _write(tensors: Mapping[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {PREFIX + k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    save_file(content, folder / WEIGHTS, metadata={"format": "pt"})


def _whole(model: PreTrainedModel) -> list[str]:
    """Paths of the modules that are trained whole."""
    return [
        path
        for path, module in model.named_modules()
        if not isinstance(module, Delta | TokenEmbedding | TokenHead)
        and any(p.requires_grad for p in module.parameters(recurse=False))
    ]


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


def _shortest_ends(model: PreTrainedModel, paths: list[str]) -> list[str]:
    """The same for modules_to_save, whose names PEFT matches by any end of a path."""
    every = [path for path, _ in model.named_modules()]
    names = []
    for path in paths:
        name = path.rpartition(".")[2]
        alone = all(other in paths for other in every if other.endswith(name))
        names.append(name if alone else path)
    return sorted(set(names))
