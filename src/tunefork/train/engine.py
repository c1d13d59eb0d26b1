"""How a built model is run: in what form its frozen base is kept, and what of it is compiled.

The recipe says what is wanted (`train.precision`, `activation_checkpointing`, `compile`); here it
becomes one choice for the method, the device and the length of the run. None of it changes what is
computed but by rounding.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tunefork.errors import ModelError
from tunefork.kernels.layout import Products, Storage
from tunefork.model.bank import Bank
from tunefork.model.device import has_int8
from tunefork.model.head import find_head
from tunefork.model.layers import compile_last_norm, draws, prepare_layers
from tunefork.recipe import Compile, Method, Recipe
from tunefork.train.out_of_memory import Remedies
from tunefork.train.runner import Runner

_WORTH_COMPILING = 100
"""Optimiser steps from which on `train.compile: auto` compiles: they take longer than compiling."""


_BANK_FORMS = 64
"""Compiled forms of a layer, after which torch.compile would give up and run it as written."""


@dataclass(frozen=True, slots=True)
class BaseForm:
    """How a frozen base is kept and multiplied."""

    storage: Storage
    products: Products


def base_form(
    recipe: Recipe, method: Method, *, device: torch.device, dtype: torch.dtype
) -> BaseForm | None:
    """The form of `method`'s frozen base, or None where its layers stay as they are built.

    Raises ModelError where `train.precision: int8` cannot be had.
    """
    wants_int8 = recipe.train.precision == "int8"
    if method is Method.FULL:
        return None
    if wants_int8 and recipe.lora.dora:
        raise ModelError(
            "train.precision: int8 has no form of lora.dora, whose rows' lengths need the base's "
            "weights in each step; leave one of the two out"
        )
    if wants_int8 and device.type == "cuda" and not has_int8(device):
        capability = torch.cuda.get_device_capability(device)
        raise ModelError(
            "train.precision: int8 needs a GPU of compute capability 8.0 or later (Ampere), "
            f"and this is one of {capability[0]}.{capability[1]}; set bf16"
        )
    return form_of(
        method,
        kind=device.type,
        dtype=dtype,
        wants_int8=wants_int8,
        is_dora=recipe.lora.dora,
    )


def form_of(
    method: Method,
    *,
    kind: str,
    dtype: torch.dtype,
    wants_int8: bool,
    is_dora: bool,
) -> BaseForm | None:
    """`base_form` on a device of `kind` ("cuda" or "cpu") that can do what is wanted of it."""
    is_full = method is Method.FULL
    if is_full or is_dora or dtype != torch.bfloat16 or (kind != "cuda" and not wants_int8):
        return None
    products: Products = "int8" if wants_int8 else "bf16"
    if method is Method.QLORA:
        return BaseForm("nf4", products)
    return BaseForm("int8" if wants_int8 else "bf16", products)


def compiles(wanted: Compile, kind: str, num_steps: int) -> bool:
    """Whether a run of so many optimiser steps on a device of `kind` compiles its layers."""
    is_long = num_steps >= _WORTH_COMPILING
    return kind == "cuda" and (wanted == "always" or (wanted == "auto" and is_long))


def prepare(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    num_steps: int,
    remedies: Remedies | None = None,
    bank: Bank | None = None,
    releases: bool = False,
) -> Runner:
    """Have the built `model` run as the recipe says while it is trained, in place.

    With `releases` gradients are freed as they come, and no pass is captured: a graph's gradients
    stay where they are. With a `bank` its passes are of many adapters.

    Raises ModelError where the recipe asks for checkpointing that the architecture has not.
    """
    checkpointing = recipe.train.checkpointing
    is_compiled = compiles(recipe.train.compile, model.device.type, num_steps)
    if bank is not None:
        is_compiled &= bank.is_fused  # the loop over segments knows their ends
    if bank is not None and is_compiled:
        # Even and uneven segments, a bank that was cut anew: more forms than one adapter has.
        torch._dynamo.config.recompile_limit = _BANK_FORMS
    prepare_layers(model, checkpointing, compiles=is_compiled)
    if is_compiled:
        compile_last_norm(model)
    head = find_head(model)
    # Random numbers that a replay draws are not those of a launch: a resumed run, which launches
    # other steps than the first one did, would not be the same. Offloading waits on the host.
    captures = is_compiled and not draws(model) and checkpointing != "offload" and not releases
    return Runner(
        model,
        head,
        pads=is_compiled and head.takes_segments,
        captures=captures and head.takes_segments,
        remedies=remedies,
        bank=bank,
    )
