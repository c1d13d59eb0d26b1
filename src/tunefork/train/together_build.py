"""A group from a recipe: one base, loaded once, with a slot for each member."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.model.add_bank import add_bank
from tunefork.model.bank import Bank, BankAdapter
from tunefork.model.build import quantize_nf4
from tunefork.model.onednn import bound_shapes
from tunefork.recipe import LoraSection, Method, Recipe
from tunefork.train.engine import prepare
from tunefork.train.guard import check_weights
from tunefork.train.member import Member
from tunefork.train.method import load_and_fuse
from tunefork.train.out_of_memory import Remedies
from tunefork.train.state import State
from tunefork.train.together import Group, GroupSettings


def load_for_group(
    recipe: Recipe,
    method: Method,
    adapters: Sequence[BankAdapter],
    *,
    dtype: torch.dtype,
    device: torch.device,
    announced: Sequence[LoraSection] = (),
    examples: Sequence[Encoded] = (),
) -> Bank:
    """The recipe's base with a bank of `adapters`, in the form in which `load_for_training` has it.

    The recipe's own `lora` is not looked at. `announced` are those that may join later, `examples`
    what int8 products are made for. Raises ModelError where it cannot be.
    """
    bound_shapes(len(adapters) + len(announced))
    banks: list[Bank] = []

    def put(model: PreTrainedModel, at: torch.device) -> None:
        if method is Method.QLORA:
            quantize_nf4(model, at)
        elif at == device:  # else its weights go there group by group
            model.to(at)
        banks.append(add_bank(model, adapters, announced=announced))

    load_and_fuse(recipe, method, put, dtype=dtype, device=device, examples=examples)
    [bank] = banks
    bank.to(device)
    return bank


def group_of(
    bank: Bank,
    members: Sequence[Member],
    recipe: Recipe,
    *,
    pad_id: int,
    starts: Mapping[str, State] | None = None,
) -> Group:
    """The group of `members`, which `bank` was loaded for, run as `recipe` says of what they share.

    Those fields are `train.micro_batch_tokens` (of a pass over all of them), `packing`, `compile`,
    `activation_checkpointing`, `deterministic` and `on_out_of_memory`.
    """
    check_weights(bank.model, recipe.model.id)
    longest = max((len(member.steps) for member in members), default=0)
    remedies = Remedies.of(recipe, recipe.method, bank.device)
    runner = prepare(bank.model, recipe, num_steps=longest, remedies=remedies, bank=bank)
    settings = GroupSettings(
        recipe.train.micro_batch_tokens,
        recipe.train.packing,
        pad_id,
        recipe.train.on_out_of_memory,
    )
    return Group(bank, members, settings, runner=runner, starts=starts)
