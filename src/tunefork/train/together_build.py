"""A group from a recipe: one base, loaded once, with a slot for each member."""

from collections.abc import Mapping, Sequence

import torch

from tunefork.data.isolation import check_packing
from tunefork.model.bank import Bank, BankAdapter, add_bank
from tunefork.model.build import quantize_nf4
from tunefork.model.fused import fuse
from tunefork.model.load import load_model
from tunefork.recipe import LoraSection, Method, Recipe
from tunefork.train import deterministic
from tunefork.train.engine import base_form, prepare
from tunefork.train.guard import check_weights
from tunefork.train.member import Member
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
) -> Bank:
    """The recipe's base with a bank of `adapters`, in the form in which `load_for_training` has it.

    The recipe's own `lora` is not looked at. `announced` are those that may join later. Raises
    ModelError where it cannot be.
    """
    deterministic.prepare(recipe.train.deterministic)
    model = load_model(recipe.model, dtype=dtype, device=device, in_host_memory=True)
    form = base_form(recipe, method, device=device, dtype=dtype)
    # An FP8 base is quantised group by group on its way from the host to the device.
    at = torch.device("cpu") if form is not None and form.storage != "nf4" else device
    if method is Method.QLORA:
        quantize_nf4(model, at)
    model.to(at)
    bank = add_bank(model, adapters, announced=announced)
    if form is not None:
        fuse(model, form.storage, form.products, device)
        bank.to(device)
    if recipe.train.packing:
        check_packing(model)
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
