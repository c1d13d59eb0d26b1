"""`train.activation_checkpointing: auto`: the fastest kind whose memory fits.

The kinds from `none` to `offload` each keep less on the device than the one before, and each does
all that the one before does and something besides (`model/layers.py`): so the first that fits is
the fastest. It is settled once, before a run's model is loaded, and from then on is part of the
run's recipe: its checkpoints, its record and its artefact hold the kind, not `auto`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from tunefork.data.example import Encoded
from tunefork.errors import BadInputError
from tunefork.model.device import pick_device
from tunefork.plan.batches import batches_of_data
from tunefork.plan.built import Build
from tunefork.plan.case import Case
from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import Target, dtype_for, free_here
from tunefork.plan.method import fits_without_passes
from tunefork.plan.passes import Shape
from tunefork.plan.shape import config_for, count_params
from tunefork.recipe import Checkpointing, Method, Recipe
from tunefork.train.checkpoints import last_setting
from tunefork.train.engine import compiles

_GIB = 2**30


def fastest_that_fits(case: Case, shape: Shape) -> Case:
    """`case` with the first kind that fits `shape`; where none does, with what keeps the least.

    A kind that the architecture has no form of is passed over. Raises BadInputError where even
    `none` cannot be planned.
    """
    kinds, least, is_hopeless = kinds_of(case.made, case.target), case, False
    for made in kinds:
        tried = replace(case, made=made)
        if is_hopeless and made is not kinds[-1]:
            continue
        try:
            tried.step(shape, evaluates=True)
        except BadInputError:
            if made is kinds[0]:
                raise
            continue
        if tried.fits(shape):
            return tried
        least = tried
        # Where not even the weights fit, what lies between here and the last kind need no tracing.
        is_hopeless = not fits_without_passes(tried, shape)
    return least


def keeping_least(case: Case, shape: Shape) -> Case:
    """`case` with the kind that keeps the least: what the largest batch will be run with."""
    for made in reversed(kinds_of(case.made, case.target)):
        tried = replace(case, made=made)
        try:
            tried.step(shape)
        except BadInputError:
            continue
        return tried
    return case


def kinds_of(made: Build, target: Target) -> list[Build]:
    """`made` with each kind of checkpointing that a run on `target` has, the fastest first."""
    kinds: list[Checkpointing] = ["none", "selective", "full", "offload"]
    if not (made.is_compiled and target.is_here):
        # Not compiled it is the same as full; compiled, what it keeps is the compiler's choice,
        # another one by torch 2.11 and 2.13, of which only this machine's is known.
        kinds.remove("selective")
    if made.device == "cpu":
        kinds.remove("offload")  # would put away what it saves where it was
    return [replace(made, checkpointing=kind) for kind in kinds]


@dataclass(frozen=True, slots=True)
class Settled:
    """A recipe whose `auto` has become one kind."""

    recipe: Recipe
    why: str | None
    """In words; None where the recipe said the kind itself."""


def settle(
    recipe: Recipe, method: Method, examples: Sequence[Encoded], checkpoints: Path | None = None
) -> Settled:
    """`recipe` for a run of `method` on this machine, about to begin or to go on.

    A run that goes on from what lies in the folder `checkpoints` keeps its kind.
    """
    if recipe.train.activation_checkpointing != "auto":
        return Settled(recipe, None)
    begun = None if checkpoints is None else last_setting(checkpoints).get(_FIELD)
    if begun in get_args(Checkpointing):
        return Settled(_with(recipe, str(begun)), f"{_FIELD}: auto is {begun}, as the run began")
    kind, why = _planned(recipe, method, examples)
    return Settled(_with(recipe, kind), f"{_FIELD}: auto is {kind}: {why}")


_FIELD = "train.activation_checkpointing"


def _with(recipe: Recipe, kind: str) -> Recipe:
    train = recipe.train.model_copy(update={"activation_checkpointing": kind})
    return recipe.model_copy(update={"train": train})


def _planned(recipe: Recipe, method: Method, examples: Sequence[Encoded]) -> tuple[str, str]:
    """The kind, and why it is."""
    device = pick_device()
    try:
        target = free_here(load_catalogue())
        batches = batches_of_data(examples, recipe, seed=recipe.train.seed)
        made = Build(
            method=method,
            lora=recipe.lora,
            full=recipe.full,
            dtype=dtype_for(target, recipe.train.precision),
            checkpointing="none",
            device=target.kind,
            wants_int8=recipe.train.precision == "int8",
            is_compiled=compiles(recipe.train.compile, target.kind, batches.num_steps),
        )
        config = config_for(recipe.model)
        case = Case(config, count_params(config), made, target)
        case = fastest_that_fits(case, batches.largest)
        most = case.memory(batches.largest).process.high
    except BadInputError as error:
        kind = "none" if device.type == "cpu" else "full"
        return kind, f"the plan cannot say what it takes ({error})"
    figures = f"{most / _GIB:.1f} GiB at most, of {target.memory_bytes / _GIB:.1f} GiB"
    more = "" if most <= target.memory_bytes else ", and nothing keeps less"
    return case.made.checkpointing, figures + more
