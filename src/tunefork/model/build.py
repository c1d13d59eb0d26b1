"""From a loaded base to a model that a method can train.

    lora    every parameter frozen, `LoraLinear` in place of each target
    qlora   the same over bases quantised to NF4; linear layers that are no target are quantised too
    full    every parameter trained, no deltas

Module paths stay those of the base, so an adapter's keys are the PEFT library's.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunefork.errors import ModelError, nearest
from tunefork.model.dora import DoraLinear
from tunefork.model.linear import LoraLinear, Nf4Linear
from tunefork.model.tokens import train_rows
from tunefork.model.whole import check_whole, find_whole, train_whole
from tunefork.recipe import LoraSection, Method

_BLOCKS = {"attention": ("attn", "attention"), "mlp": ("mlp", "feed_forward", "ffn")}


def build(
    model: PreTrainedModel,
    method: Method,
    lora: LoraSection,
    *,
    seed: int,
    device: torch.device | None = None,
    new_ids: tuple[int, ...] = (),
) -> None:
    """Make `model` trainable by `method` on `device` (default: where it is), in place.

    `seed` initialises the deltas; `new_ids` are the tokens that the recipe added.
    """
    match method:
        case Method.FULL:
            model.to(device).requires_grad_(True)
        case Method.LORA:
            model.to(device)
            add_deltas(model, lora, seed=seed, new_ids=new_ids)
        case Method.QLORA:
            quantize_nf4(model, device)
            add_deltas(model, lora, seed=seed, new_ids=new_ids)


def check_lora(model: PreTrainedModel, lora: LoraSection) -> list[str]:
    """Paths of the layers that `lora` adapts, in order; `model` may be on the meta device.

    Raises ModelError for targets that match nothing, a rank above a layer's size, or layers whose
    weights are not a linear layer's.
    """
    paths = find_targets(model, lora.targets)
    for path in paths:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear | Nf4Linear)
        smaller = min(layer.in_features, layer.out_features)
        if lora.rank > smaller:
            raise ModelError(
                f"lora.rank: {lora.rank} is above the size of {path} ({layer.in_features} -> "
                f"{layer.out_features}); at most {smaller} makes sense there, or leave it out of "
                "lora.targets"
            )
    if both := set(paths) & set(find_whole(model, lora.modules_to_save)):
        raise ModelError(
            f"lora.modules_to_save: {min(both)} is trained whole there and has a delta by "
            "lora.targets; leave it out of one of the two"
        )
    return paths


def check_new_rows(model: PreTrainedModel, lora: LoraSection) -> bool:
    """Whether `lora.modules_to_save` trains the rows of added tokens; ModelError for half of them.

    Where it names neither the embedding nor the head, their new rows are trained alone.
    """
    whole = {model.get_submodule(path) for path in find_whole(model, lora.modules_to_save)}
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    if whole & ends and not ends <= whole:
        raise ModelError(
            "lora.modules_to_save: names one of the embedding and the output head, and the rows of "
            "model.add_tokens in the other would stay untrained; name both, or neither (then the "
            "new rows alone are trained)"
        )
    return ends <= whole


def check_method(
    model: PreTrainedModel, method: Method, lora: LoraSection, *, adds_tokens: bool = False
) -> None:
    """Raise ModelError where `method` cannot train `model`, which may be on the meta device."""
    if method is not Method.FULL:
        check_lora(model, lora)
        check_whole(model, lora.modules_to_save, is_nf4=method is Method.QLORA)
        if adds_tokens:
            check_new_rows(model, lora)
    if method is Method.QLORA:  # layers that are no target are quantised too
        _refuse_unusual_weights(model)


def add_deltas(
    model: PreTrainedModel, lora: LoraSection, *, seed: int, new_ids: tuple[int, ...] = ()
) -> list[str]:
    """Freeze `model` and put a delta on each of `lora.targets`; returns their paths in order.

    `lora.modules_to_save` are trained whole, and the rows of the added tokens `new_ids`.

    Raises ModelError as `check_lora` does.
    """
    paths = check_lora(model, lora)
    whole = check_whole(model, lora.modules_to_save, is_nf4=False)
    adds_rows = bool(new_ids) and not check_new_rows(model, lora)
    model.requires_grad_(False)
    kind = DoraLinear if lora.dora else LoraLinear
    scale = lora_scale(lora)
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear | Nf4Linear)
        layer = kind(base, rank=lora.rank, scale=scale, dropout=lora.dropout, generator=generator)
        replace(model, path, layer)
    train_whole(model, whole)
    if adds_rows:
        train_rows(model, new_ids)
    return paths


def quantize_nf4(model: PreTrainedModel, device: torch.device | None = None) -> None:
    """Replace every linear layer but the output head by its NF4 form, and move `model` to `device`.

    Layer by layer: a model in host memory never takes more of a GPU than one of its layers does
    beside the 4-bit rest.
    """
    _refuse_unusual_weights(model)
    for path in linear_paths(model):
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        replace(model, path, Nf4Linear(linear, device))
    model.to(device)
    for kept in model.parameters():
        if kept.device.type == "cpu":
            # From a file it lies within the whole file, mapped into memory while any of it is used.
            kept.data = kept.data.clone()


def lora_scale(lora: LoraSection) -> float:
    """What B A x is multiplied by: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    return lora.alpha / (lora.rank**0.5 if lora.scaling == "rslora" else lora.rank)


def find_targets(model: PreTrainedModel, targets: str | tuple[str, ...]) -> list[str]:
    """Paths of the linear layers that `targets` names, in module order, never the output head."""
    linear = linear_paths(model)
    if targets == "all-linear":
        _refuse_unusual_weights(model)
        return linear
    if isinstance(targets, str):
        marks = _BLOCKS[targets]
        found = [p for p in linear if any(m in part for part in p.split(".")[:-1] for m in marks)]
        if not found:
            raise ModelError(
                f"lora.targets: {targets!r} matches no linear layer of {type(model).__name__}; "
                f"name some of {_names(linear)}"
            )
        return found
    for target in targets:
        if not any(_is(path, target) for path in linear):
            raise ModelError(
                f"lora.targets: {target!r} matches no linear layer of {type(model).__name__}"
                f"{nearest(target, _names(linear))}; there are {', '.join(_names(linear))}"
            )
    return [path for path in linear if any(_is(path, target) for target in targets)]


def replace(model: PreTrainedModel, path: str, module: nn.Module) -> None:
    """Put `module` where `path` points."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _is(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)


def _names(paths: list[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def linear_paths(model: PreTrainedModel) -> list[str]:
    """Paths of the linear layers, quantised or not, but for the output head."""
    head = model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Nf4Linear) and module is not head
    ]


def _refuse_unusual_weights(model: PreTrainedModel) -> None:
    """Name the first layer that is a projection but no nn.Linear, rather than leave it out."""
    for path, module in model.named_modules():
        if isinstance(module, Conv1D):
            raise ModelError(
                f"{type(model).__name__}: {path} is a Conv1D, not a linear layer; models built on "
                "Conv1D (GPT-2) can be trained with method full only"
            )
        if isinstance(module, nn.Conv1d):  # a recurrent layer's short filter: no projection
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.shape[0] > 1 and parameter.shape[1] > 1:
                raise ModelError(
                    f"{type(model).__name__}: {path}.{name} holds the weights of several experts "
                    "in one 3-D tensor, which deltas do not cover; name the linear layers to adapt "
                    "in lora.targets (method lora), or use method full"
                )
