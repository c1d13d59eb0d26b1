"""Successive halving: which variants go on from a rung, and how sure it is that the rest are worse.

A rung is decided once all that are to reach it have: the decision depends on the figures alone,
never on how many trained at one time or how fast. Configurations are ranked by their validation
loss, the mean over their seeds, all on the same examples; how far behind one is comes with its
paired interval, so that a reader sees which drops were close.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunefork.evaluate.statistics import Columns, paired_difference
from tunefork.page.estimate import Estimate
from tunefork.recipe import HalvingSection

_SAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Ranked:
    """One configuration at a rung."""

    configuration: str
    loss: float | None
    """Mean over seeds, nats; None: none of its variants is left."""
    place: int
    """From 1, the best; among those ranked against each other."""
    of: int
    is_kept: bool
    behind: Estimate | None
    """Its loss minus the best one's, paired; None for the best itself, and where there is none."""


def rung_steps(section: HalvingSection | None, num_steps: int) -> list[int]:
    """After which steps of a run of `num_steps` variants are dropped, ascending."""
    if section is None:
        return []
    places = (round(num_steps * section.keep**n) for n in range(section.rungs, 0, -1))
    return sorted({step for step in places if 0 < step < num_steps})


def decide(
    columns: Mapping[str, Sequence[Columns]], groups: Mapping[str, object], keep: float
) -> list[Ranked]:
    """Rank the configurations (name -> its seeds' validation columns) within their `groups`.

    Of each group's, the better `keep` go on, rounded up; those without columns never do.
    """
    found = []
    for group in dict.fromkeys(groups[name] for name in columns):
        names = [name for name in columns if groups[name] == group]
        losses = {name: mean_loss(columns[name]) for name in names if columns[name]}
        order = sorted(losses, key=lambda name: (losses[name], names.index(name)))
        order += [name for name in names if name not in losses]
        num_kept = min(math.ceil(keep * len(names)), len(losses))
        for place, name in enumerate(order, start=1):
            behind = None
            if place > 1 and name in losses:
                behind = _behind(columns[name], columns[order[0]])
            found.append(
                Ranked(name, losses.get(name), place, len(names), place <= num_kept, behind)
            )
    return found


def mean_loss(runs: Sequence[Columns]) -> float:
    """Nats per supervised token, the mean over `runs`."""
    return sum(float(run["loss_sum"].sum() / run["tokens"].sum()) for run in runs) / len(runs)


def _behind(own: Sequence[Columns], best: Sequence[Columns]) -> Estimate:
    by_seed = len(own) == len(best)
    difference = paired_difference("loss", own, best, samples=_SAMPLES, by_seed=by_seed)
    return Estimate(value=difference.value, low=difference.low, high=difference.high)
