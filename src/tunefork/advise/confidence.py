"""How sure the advice is: what its votes rest on, and what was not said."""

from collections.abc import Mapping, Sequence

from tunefork.advise.advice import Confidence
from tunefork.advise.facts import Facts
from tunefork.advise.rules import Branch, Vote
from tunefork.compare.evidence import LEVEL

DECISIVE = 8
"""A vote from this weight on is more than a preference (rules.py)."""
CLEAR, FAIR = 4, 2
"""How far ahead of the next branch the winning one must be."""


def confidence(
    facts: Facts, weights: Mapping[Branch, int], winner: Branch, votes: Sequence[Vote]
) -> tuple[Confidence, str]:
    """The level and why; `votes` are those that apply and speak for `winner`."""
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
