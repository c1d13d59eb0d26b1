"""Modules that are trained whole beside the deltas, and the untying that this may take.

A module named so is trained where it is: nothing else uses the base, so no copy is kept. An output
head that shares the embedding's tensor is given its own as soon as one of the two is trained, and
the configuration says so: else the other would change too, and a file with two tensors would be
read as one (peft#2018, peft#2777).
"""

from torch import nn
from transformers import PreTrainedModel

from tunefork.errors import ModelError, nearest
from tunefork.model.linear import Nf4Linear


def find_whole(model: PreTrainedModel, names: tuple[str, ...]) -> list[str]:
    """Paths of the modules that `names` mean (a path, or its end), in module order.

    Raises ModelError for a name that means none, or a block of modules.
    """
    leaves = [
        path
        for path, module in model.named_modules()
        if isinstance(module, Nf4Linear) or any(True for _ in module.parameters(recurse=False))
    ]
    for name in names:
        if not any(_is(path, name) for path in leaves):
            known = sorted({path.rpartition(".")[2] for path in leaves})
            raise ModelError(
                f"lora.modules_to_save: {name!r} names no module with weights of its own in "
                f"{type(model).__name__}{nearest(name, known)}; there are {', '.join(known)}"
            )
    return [path for path in leaves if any(_is(path, name) for name in names)]


def check_whole(model: PreTrainedModel, names: tuple[str, ...], *, is_nf4: bool) -> list[str]:
    """`find_whole`; raises ModelError where 4 bits would leave nothing to train."""
    paths = find_whole(model, names)
    head = model.get_output_embeddings()
    for path in paths:
        module = model.get_submodule(path)
        in_4_bits = is_nf4 and isinstance(module, nn.Linear) and module is not head
        if in_4_bits or isinstance(module, Nf4Linear):
            raise ModelError(
                f"lora.modules_to_save: {path} is a linear layer, which qlora holds in 4 bits and "
                "cannot train; name it in lora.targets instead, or use lora"
            )
    return paths


def train_whole(model: PreTrainedModel, paths: list[str]) -> None:
    """Train the modules at `paths`, untied from what they share a tensor with."""
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    if ends & {model.get_submodule(path) for path in paths}:
        untie(model)
    for path in paths:
        model.get_submodule(path).requires_grad_(True)


def untie(model: PreTrainedModel) -> bool:
    """Give a tied output head a tensor of its own; returns whether it was tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not is_tied(model):
        return False
    assert isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)
    head.weight = nn.Parameter(
        embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad
    )
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return True


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the embedding's tensor."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(embedding, "weight", None)


def path_of(model: PreTrainedModel, module: nn.Module) -> str:
    """Where `module` is in `model`."""
    paths = (path for path, candidate in model.named_modules() if candidate is module)
    return str(next(paths))


def _is(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)
