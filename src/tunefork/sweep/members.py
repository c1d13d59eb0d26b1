"""Recipes become members of a group: their data read once, their validation cut off, their steps
counted, and what a group cannot do refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunefork.data.loader import Data, load_data
from tunefork.errors import RecipeError
from tunefork.recipe import Method, Recipe
from tunefork.sweep.group import Member
from tunefork.sweep.halving import rung_steps
from tunefork.sweep.variants import Variant
from tunefork.train.method import plan_steps
from tunefork.trial.training import held_back

VARIANTS = "variants"
"""Folder of a sweep's run folders."""


@dataclass(slots=True)
class Shelf:
    """Data by what it is made from: variants that differ in a learning rate share theirs."""

    tokenizer: Any
    _read: dict[str, Data] = field(default_factory=dict)

    def put(self, recipe: Recipe, data: Data) -> None:
        """Of a recipe whose data was read before."""
        self._read[_key(recipe)] = data

    def data(self, recipe: Recipe) -> Data:
        """The recipe's, read at its first use. Raises DataError."""
        key = _key(recipe)
        if key not in self._read:
            self._read[key] = load_data(recipe, self.tokenizer)
        return self._read[key]


def _key(recipe: Recipe) -> str:
    return f"{recipe.data.model_dump_json()} {recipe.data_seed}"


def members_of(recipe: Recipe, found: Sequence[Variant], out: Path, shelf: Shelf) -> list[Member]:
    """The variants of the sweep `recipe` as members, each with validation examples and rungs.

    Raises RecipeError where a run is too short for its rungs, or where a mixture of data is judged
    on other examples than the rest.
    """
    halving, members = recipe.sweep.halving, []
    for variant in found:
        own = _validated(recipe, variant.recipe)
        data = shelf.data(own)
        examples, validation = held_back(data, own)
        num_steps = len(plan_steps(own, len(examples), seed=own.train.seed))
        rungs = rung_steps(halving, num_steps)
        if halving is not None and len(rungs) < halving.rungs:
            raise RecipeError(
                f"sweep.halving: {variant.name} has {num_steps} steps, too few for {halving.rungs} "
                f"rungs at {halving.keep:g}; lower sweep.halving.rungs, or train longer"
            )
        if recipe.train.validate_every_steps is None:
            train = own.train.model_copy(update={"validate_every_steps": num_steps})
            own = own.model_copy(update={"train": train})
        members.append(
            Member(
                name=variant.name,
                recipe=own,
                folder=out / VARIANTS / variant.name,
                data=data,
                examples=examples,
                validation=validation,
                num_steps=num_steps,
                rungs=tuple(rungs),
            )
        )
    _check_judges(members)
    return members


def _validated(recipe: Recipe, variant: Recipe) -> Recipe:
    """A variant that holds validation examples back, the same for all."""
    if recipe.train.validate_every_steps is not None:
        return variant
    update = {"validate_every_steps": 1, "validation_share": recipe.sweep.validation_share}
    return variant.model_copy(update={"train": variant.train.model_copy(update=update)})


def _check_judges(members: Sequence[Member]) -> None:
    """Raise RecipeError unless all are judged and chosen by the same examples."""
    first = members[0]
    for member in members[1:]:
        if member.data is first.data:
            continue
        same = len(member.data.eval) == len(first.data.eval) and all(
            a.input_ids.tolist() == b.input_ids.tolist()
            for a, b in zip(member.data.eval, first.data.eval, strict=True)
        )
        if not same or member.data.labels != first.data.labels:
            raise RecipeError(
                f"sweep.data: {member.name} would be evaluated on other examples, or labels, than "
                f"{first.name}; give data.eval, and data.labels where labels are answered"
            )


def alone(name: str, recipe: Recipe, folder: Path, data: Data) -> Member:
    """A member that is chosen from by nobody: trained as `tunefork train` would."""
    examples, validation = held_back(data, recipe)
    num_steps = len(plan_steps(recipe, len(examples), seed=recipe.train.seed))
    return Member(name, recipe, folder, data, examples, validation, num_steps)


def refuse(recipe: Recipe, where: str = "") -> None:
    """Raise RecipeError for what a group cannot do; `where` says in whose recipe it stands."""
    at = f"{where}: " if where else ""
    alone = "train it alone (tunefork train)"
    found: list[tuple[bool, Callable[[], str]]] = [
        (recipe.method is Method.FULL, lambda: "method: full has no base to share; use lora"),
        (recipe.lora.dora, lambda: f"lora.dora: needs a pass of its own; leave it out, or {alone}"),
        (
            bool(recipe.lora.modules_to_save),
            lambda: f"lora.modules_to_save: changes the base that is shared; {alone}",
        ),
        (
            bool(recipe.model.add_tokens),
            lambda: f"model.add_tokens: changes the base that is shared; {alone}",
        ),
        (
            recipe.train.keep == "best",
            lambda: f"train.keep: best is for a run alone; leave it out, or {alone}",
        ),
        (
            recipe.train.on_loss_spike != "warn",
            lambda: (
                f"train.on_loss_spike: {recipe.train.on_loss_spike} is for a run alone; leave "
                f"it out, or {alone}"
            ),
        ),
    ]
    for is_set, message in found:
        if is_set:
            raise RecipeError(at + message())
