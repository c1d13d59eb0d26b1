"""From a situation to facts: the model's size, the amount of data, the machine, the experience."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunefork.advise.amount import amount_of
from tunefork.advise.capacity import rank_for, rank_needed
from tunefork.advise.estimate import Estimates, size_text
from tunefork.advise.experience import find
from tunefork.advise.facts import Facts
from tunefork.advise.planner import Planner, TracedPlanner
from tunefork.advise.situation import Situation, SituationError, size_in
from tunefork.advise.starting import PLACEHOLDER
from tunefork.errors import ModelError
from tunefork.plan.catalogue import Catalogue
from tunefork.recipe import ModelSection, Recipe
from tunefork.recipe_file import load

UNSAID_PARAMS = 8e9
"""Assumed where no size is known: the commonest size that is fine-tuned."""
DISAGREE = 1.5
"""A size that was said and one that was read may differ by this factor at most."""

PlannerFor = Callable[[ModelSection | float], Planner]


@dataclass(frozen=True, slots=True)
class Resolved:
    """A situation with everything looked up that the advice needs."""

    facts: Facts
    model: str
    """For the recipe: what was named, or a placeholder."""
    recipe: Recipe | None
    """The one that the situation names as its model."""
    assumptions: list[str]
    faults: list[str]
    """Comparisons that could not be read."""


@dataclass(frozen=True, slots=True)
class _Model:
    planner: Planner
    params: float
    is_size_known: bool
    name: str
    recipe: Recipe | None
    note: str


def resolve(
    situation: Situation,
    catalogue: Catalogue,
    runs: Sequence[Path] = (),
    planner_for: PlannerFor | None = None,
) -> Resolved:
    """Look up what follows from `situation`; `runs` are folders that may hold comparisons.

    Raises SituationError, CatalogueError, and ModelError where the model cannot be read and
    no size is given.
    """
    machine = None if situation.gpus is None else catalogue.machine(situation.gpus)
    model = _model(situation, planner_for or TracedPlanner)
    amount = amount_of(situation)
    needed = rank_needed(model.planner, amount.supervised_tokens)
    is_deep = situation.change == "behaviour" or amount.is_plain_text
    rank = rank_for(needed, is_deep=is_deep)
    tenants = situation.tenants or 1
    hours = situation.deadline_hours
    estimates = Estimates(
        planner=model.planner,
        catalogue=catalogue,
        amount=amount,
        rank=rank,
        at_hand=machine,
        deadline_s=None if hours is None else hours * 3600 / tenants,
        may_leave=situation.data_may_leave is not False,
    )
    known = model.params if model.is_size_known else None
    experiences, faults = find(runs, situation, known)
    facts = Facts(
        situation=situation,
        params=model.params,
        is_size_known=model.is_size_known,
        amount=amount,
        rank_needed=needed,
        rank=rank,
        estimates=estimates,
        experiences=experiences,
    )
    assumptions = [note for note in (model.note, amount.note) if note]
    return Resolved(facts, model.name, model.recipe, assumptions, faults)


def _model(situation: Situation, planner_for: PlannerFor) -> _Model:
    """The model that the situation names, by its config where that is at hand, else by its size."""
    named, recipe = situation.model, None
    section: ModelSection | None = None
    if named is not None and Path(named).suffix in (".yaml", ".yml"):
        recipe = load(Path(named))
        section = recipe.model
    elif named is not None and _bare_size(named) is None:
        section = ModelSection(id=named)
    said = situation.model_params or (size_in(section.id if section else named) if named else None)
    if section is None:
        params = float(said or UNSAID_PARAMS)
        note = "" if said else f"a model of {size_text(params)} parameters"
        name = f"{PLACEHOLDER}-{size_text(params)}"
        return _Model(planner_for(params), params, said is not None, name, None, note)
    if said is not None and not _is_at_hand(section):
        note = (
            f"the config of {section.id} is not on this machine: the shape is that of a Llama of "
            f"{size_text(said)} parameters"
        )
        return _Model(planner_for(float(said)), float(said), True, section.id, recipe, note)
    planner = planner_for(section)
    try:
        params = planner.params
    except ModelError as error:
        raise ModelError(f"{error}; or say how large it is (model_params: 8B)") from error
    _check_size(situation, section.id, params)
    return _Model(planner, params, True, section.id, recipe, "")


def _check_size(situation: Situation, id: str, read: float) -> None:
    said = situation.model_params
    if said is not None and not 1 / DISAGREE < read / said < DISAGREE:
        raise SituationError(
            f"model_params: {said:g} is not the size of {id} ({read:g}, by its config); "
            "give one of them"
        )


def _bare_size(name: str) -> float | None:
    """The size, where `name` is nothing else: `8B`."""
    return size_in(name) if name.strip()[:-1].replace(".", "", 1).isdigit() else None


def _is_at_hand(section: ModelSection) -> bool:
    """Whether the config can be read without asking a hub: advice needs no network."""
    from tunefork.model.packaged import PACKAGED

    if section.id in PACKAGED or Path(section.id).expanduser().exists():
        return True
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(section.id, "config.json", revision=section.revision)
    except ValueError as error:  # no name that a hub could have
        raise ModelError(f"model: {section.id} is no folder and no hub id ({error})") from error
    return isinstance(cached, str)
