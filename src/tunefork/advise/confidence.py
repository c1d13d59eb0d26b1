"""How sure the advice is: what its votes rest on, and what was not said."""

from collections.abc import Mapping, Sequence

from tunefork.advise.advice import Confidence
from tunefork.advise.facts import Facts
from tunefork.advise.figures import fill
from tunefork.advise.rules import Branch, Vote
from tunefork.compare.evidence import LEVEL
from tunefork.recipe import Method

DECISIVE = 8
"""A vote from this weight on is more than a preference (rules.py)."""
CLEAR, FAIR = 4, 2
"""How far ahead of the next branch the winning one must be."""


LONG_S = 90 * 86_400.0
"""A training of a quarter of a year and more is no plan that anybody carries out."""
DEAR_USD = 1_000_000.0
"""Likewise from here on, where no budget was given: 20 times what a full experiment is said to cost
at most (mission.md's rule 7)."""
FAR = 10.0
"""Times the budget or the deadline, from which on it is not even near."""


def confidence(
    facts: Facts,
    weights: Mapping[Branch, int],
    winner: Branch,
    votes: Sequence[Vote],
    method: Method | None,
) -> tuple[Confidence, str]:
    """The level and why; `votes` are those that apply and speak for `winner`.

    An answer that cannot be carried out as asked (`method`'s cost, time or memory) is less sure
    than the rules behind it.
    """
    level, text = _of_rules(facts, weights, winner, votes)
    if method is None:
        return level, text
    most, obstacle = _obstacle(facts, method)
    if not obstacle:
        return level, text
    return min(level, most, key=_LEVELS.index), f"{text} But {obstacle}."


_LEVELS: tuple[Confidence, ...] = ("low", "medium", "high")


def _obstacle(facts: Facts, method: Method) -> tuple[Confidence, str]:
    """The highest level that cost, time and memory leave, and what stands in the way."""
    if facts.best(method) is None:
        return "low", "it fits no machine of up to eight GPUs"
    seconds, usd = facts.seconds(method), facts.cost_usd(method)
    hours, budget = facts.situation.deadline_hours, facts.situation.budget_usd
    price = usd if facts.is_paid(method) else 0.0
    late = 0.0 if hours is None else seconds / (hours * 3600)
    if price > FAR * (budget if budget is not None else DEAR_USD / FAR):
        return "low", fill(f"it would cost about {{{method}_cost}}", facts)
    if seconds > LONG_S or late > FAR:
        return "low", fill(f"it would take about {{{method}_time}}", facts)
    if facts.is_over_budget(method):
        return "medium", fill(f"it costs about {{{method}_cost}}, more than the budget", facts)
    if facts.is_too_slow(method):
        return "medium", fill(f"it takes about {{{method}_time}}, longer than the deadline", facts)
    return "high", ""


def _of_rules(
    facts: Facts, weights: Mapping[Branch, int], winner: Branch, votes: Sequence[Vote]
) -> tuple[Confidence, str]:
    """The level that the rules and the situation give."""
    ahead = weights[winner] - max(w for branch, w in weights.items() if branch != winner)
    heaviest = max((vote.weight for vote in votes), default=0)
    lacking = _lacking(facts)
    measured = facts.experience
    if measured and any(vote.id.startswith("measured") for vote in votes) and ahead > 0:
        sure = measured.comparison.verdict.confidence or 0.0
        if sure >= LEVEL:
            return "high", f"You measured it, with a confidence of {sure:.0%} in the difference."
        return "medium", "You measured it, but no method was singled out by the figures."
    if len(lacking) > 1:
        return "low", f"Not said: {', '.join(lacking)}; the answer rests on assumptions."
    if ahead < FAIR:
        return "low", "The rules disagree: measure both ways (tunefork compare)."
    if lacking:
        return "medium", f"Not said: {lacking[0]}; that part is assumed."
    if heaviest >= DECISIVE and ahead >= CLEAR:
        decisive = ", ".join(vote.id for vote in votes if vote.weight >= DECISIVE)
        return "high", f"It follows from what was said ({decisive}), clearly ahead of the others."
    return "medium", "Rules of thumb agree; nothing of it is measured on your data."


def _lacking(facts: Facts) -> list[str]:
    """What essential was not said."""
    situation = facts.situation
    said = {
        "the model's size": facts.is_size_known,
        "the task": situation.task is not None or situation.change is not None,
        "the amount of data": situation.examples is not None or situation.tokens is not None,
    }
    return [what for what, is_said in said.items() if not is_said]
