"""What a member of a group leaves in its run folder: what `tunefork train` would have left.

A member's weights come out of the group as named tensors. They are put into a shell, the base on
the meta device with that member's deltas, which is saved as any trained model is.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.errors import AdapterError
from tunefork.model.build import add_deltas
from tunefork.model.load import load_skeleton, new_ids
from tunefork.recipe import Recipe


def shell(recipe: Recipe, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The recipe's base without its weights, with deltas that hold `weights` (by parameter name).

    Raises AdapterError unless `weights` are those that the recipe trains.
    """
    model = load_skeleton(recipe.model)
    add_deltas(model, recipe.lora, seed=0, new_ids=new_ids(recipe.model))
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if wanted.keys() != weights.keys():
        other = sorted(wanted.keys() ^ weights.keys())[0]
        raise AdapterError(f"{other}: is trained by the recipe or by the group, not by both")
    for name, parameter in wanted.items():
        value = weights[name].detach()
        if value.shape != parameter.shape:
            raise AdapterError(
                f"{name}: has shape {tuple(value.shape)}, not {tuple(parameter.shape)}"
            )
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, nn.Parameter(value))
    return model
