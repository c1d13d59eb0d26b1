"""How to serve the result: a table, the first row that applies."""

from collections.abc import Callable
from dataclasses import dataclass

from tunefork.advise import conditions as when
from tunefork.advise.facts import Facts
from tunefork.advise.figures import fill
from tunefork.advise.rules import ADAPTER, NOTHING, WEIGHTS, Branch


@dataclass(frozen=True, slots=True)
class Serving:
    """A row."""

    branch: Branch
    applies: Callable[[Facts], bool]
    text: str


SERVING: tuple[Serving, ...] = (
    Serving(
        NOTHING,
        when.always,
        "The model as it is, with the examples or the retrieved facts in the prompt.",
    ),
    Serving(
        ADAPTER,
        when.several_tenants,
        "One base, one adapter a customer, chosen or loaded at request time: {tenants} adapters of "
        "{adapter} over one copy of the model ({model}). One server does for all of them (vLLM "
        "and others serve adapters in one batch).",
    ),
    Serving(
        ADAPTER,
        when.is_distributed,
        "Merge the adapter into the base and hand out one artefact ({model}), or hand out the "
        "adapter ({adapter}), which belongs to exactly this version of the base.",
    ),
    Serving(
        ADAPTER,
        when.always,
        "The base with one adapter ({adapter}), loaded at start or at request time; further tasks "
        "can share the base. Merged, it serves as fast as the base alone.",
    ),
    Serving(
        WEIGHTS,
        when.several_tenants,
        "One model a customer: {tenants} models of {model}, each with a GPU of its own while it is "
        "in use.",
    ),
    Serving(
        WEIGHTS,
        when.always,
        "One model of its own ({model}), served like the base; a second task is a second model.",
    ),
)


def serving_text(facts: Facts, branch: Branch) -> str:
    """How to serve what `branch` makes."""
    row = next(row for row in SERVING if row.branch == branch and row.applies(facts))
    return fill(row.text, facts)
