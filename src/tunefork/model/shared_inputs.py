"""Which linear layers of a model read the same input.

Not from a list of names: a few tokens go through a twin of the model on the meta device, and layers
that are given the very same tensor one after the other belong together. But not one whose result is
changed in place (by OLMo's clip_qkv): of a part of a group's results PyTorch forbids that.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.model.bank_linear import BankLinear
from tunefork.model.linear import LoraLinear, Nf4Linear


def find_groups(model: PreTrainedModel) -> list[list[str]]:
    """Paths of frozen linear layers that are given the very same input one after the other, and
    whose results are left as they are.

    Where that cannot be seen each layer is a group of its own, and those without a delta that were
    not called are none: other code may read their weights.
    """
    paths = _frozen_linear_paths(model)
    seen, changed = _inputs(model, set(paths))
    called = {path for path, _ in seen}
    if sorted(path for path, _ in seen) != sorted(paths):
        # Not each once, in one pass: a layer used twice, or only for some tokens.
        kinds = {path: model.get_submodule(path) for path in paths}
        return [[p] for p in paths if p in called or not isinstance(kinds[p], nn.Linear)]
    groups: list[list[str]] = []
    last: Tensor | None = None
    for path, given in seen:
        if given is last and path not in changed:
            groups[-1].append(path)
        else:
            groups.append([path])
        last = None if path in changed else given
    return groups


def _frozen_linear_paths(model: PreTrainedModel) -> list[str]:
    """Of layers with a delta, and of those without one that are not trained; not the head's."""
    paths, within = [], tuple[str, ...]()
    head = model.get_output_embeddings()
    of_head = set() if head is None else set(head.modules())  # its own too, with trained rows
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear | BankLinear):
            within += (path + ".base",)
        is_frozen = isinstance(module, nn.Linear) and not module.weight.requires_grad
        if isinstance(module, LoraLinear | BankLinear | Nf4Linear) or (
            is_frozen and module not in of_head
        ):
            paths.append(path)
    return [path for path in paths if path not in within]


@torch.no_grad()
def _inputs(model: PreTrainedModel, paths: set[str]) -> tuple[list[tuple[str, Tensor]], set[str]]:
    """Each layer of `paths` and what it is given, in the order of a forward pass; and those whose
    results are changed in place.

    Nothing for a model that cannot run without values (a mask that it reads, say).
    """
    with torch.device("meta"):
        twin = type(model)(model.config).eval().bfloat16()  # some operators take no other
    seen: list[tuple[str, Tensor]] = []
    made: list[tuple[str, Tensor, int]] = []

    def note(path: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append((path, inputs[0]))

    def note_made(path: str, _module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
        made.append((path, output, output._version))

    for path in paths:
        layer = twin.get_submodule(path)
        layer.register_forward_pre_hook(partial(note, path))
        layer.register_forward_hook(partial(note_made, path))
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    # A ready mask: making one asks for values, and there are none here.
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device="meta")
    try:
        twin(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return [], set()
    return seen, {path for path, output, version in made if output._version != version}
