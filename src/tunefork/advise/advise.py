"""The answer: the tables of rules.py evaluated on the facts, and put together.

Votes choose a branch, forms a method of it, starts explain the knobs; the rest follows from facts.
"""

from collections.abc import Iterable, Sequence
from datetime import date

from tunefork.advise.advice import Advice, Missing, Reason, Where
from tunefork.advise.cautions import cautions
from tunefork.advise.confidence import confidence
from tunefork.advise.facts import Facts
from tunefork.advise.figures import fill
from tunefork.advise.place import nowhere, where
from tunefork.advise.resolve import Resolved
from tunefork.advise.rules import (
    ADAPTER,
    BRANCHES,
    FORMS,
    STARTS,
    VOTES,
    Answer,
    Branch,
    Form,
    Start,
    Vote,
)
from tunefork.advise.serving import serving_text
from tunefork.advise.situation import missing
from tunefork.advise.starting import ALPHA, TARGETS, recipe_fields, recipe_yaml
from tunefork.recipe import Method

TRAINS: dict[Answer, Method | None] = {
    "lora": Method.LORA,
    "qlora": Method.QLORA,
    "full": Method.FULL,
    "continued_pretraining": Method.FULL,
    "distillation": Method.FULL,
    "none": None,
}
"""Answer -> what `tunefork train` does for it."""
HEADLINES: dict[Answer, str] = {
    "lora": "LoRA, rank {rank}",
    "qlora": "QLoRA, rank {rank}: LoRA over the base in 4 bits",
    "full": "Full fine-tuning",
    "continued_pretraining": "Continued pre-training, a form of full fine-tuning",
    "distillation": "Full fine-tuning on the teacher's outputs (distillation)",
    "none": "Do not fine-tune: prompt or retrieve",
}


def advise(resolved: Resolved, today: date | None = None) -> Advice:
    """What to do in the situation; `today` decides which managed services still take jobs."""
    facts = resolved.facts
    applying = [vote for vote in VOTES if vote.applies(facts)]
    weights = {b: sum(v.weight for v in applying if v.branch == b) for b in BRANCHES}
    branch = max(BRANCHES, key=lambda b: weights[b])
    votes = [vote for vote in applying if vote.branch == branch]
    form = next(form for form in FORMS if form.branch == branch and form.applies(facts))
    method = TRAINS[form.method]
    level, level_text = confidence(facts, weights, branch, votes, method)
    reasons = list(_reasons(facts, branch, votes, form))
    headline = fill(HEADLINES[form.method], facts)
    place = nowhere() if method is None else where(facts, form.method, method, _day(today))
    best = None if method is None else facts.best(method) or facts.estimates.here(method)
    recipe = None
    if method is not None:
        recipe = recipe_fields(facts, form.method, method, resolved.model, resolved.recipe)
    is_low_rank = branch == ADAPTER
    return Advice(
        method=form.method,
        text=_text(headline, place),
        rank=facts.rank if is_low_rank else None,
        alpha=ALPHA if is_low_rank else None,
        targets=TARGETS if is_low_rank else None,
        learning_rate=None if method is None else facts.learning_rate(method),
        batch_size=None if method is None else facts.amount.batch_size,
        epochs=None if method is None else facts.amount.epochs,
        serving=serving_text(facts, branch),
        confidence=level,
        confidence_text=level_text,
        reasons=reasons,
        against=[_reason(facts, vote) for vote in applying if vote.branch != branch],
        would_change=_borders(facts, branch, applying, form),
        warnings=[] if method is None else list(cautions(facts, method)),
        missing=[Missing(key=k, effect=e) for k, e in missing(facts.situation).items()],
        where=place,
        plan=None if best is None else facts.estimates.side_by_side(best.machine),
        recipe=recipe,
        recipe_yaml=None if recipe is None else recipe_yaml(recipe, headline, reasons),
        measured=_measured(resolved),
        assumptions=resolved.assumptions,
    )


def _text(headline: str, place: Where) -> str:
    """The answer with the place that is recommended for it."""
    if place.recommended == "managed":
        service = next(offer for offer in place.managed if offer.is_usable)
        return f"{headline}, by a managed service: {service.name}."
    if place.recommended == "own" and place.own is not None:
        return f"{headline}, on {place.own.machine}."
    return f"{headline}."


def _day(today: date | None) -> date:
    return today or date.today()


def _reasons(facts: Facts, branch: Branch, votes: Sequence[Vote], form: Form) -> Iterable[Reason]:
    """Why: the form of the answer, then the votes, the heaviest first, then where to start."""
    heaviest_first = sorted(votes, key=lambda vote: -vote.weight)
    starts = [start for start in STARTS if branch in start.branches and start.applies(facts)]
    rows: list[Vote | Form | Start] = [form, *heaviest_first, *starts]
    for row in rows:
        yield _reason(facts, row)


def _reason(facts: Facts, row: Vote | Form | Start) -> Reason:
    return Reason(text=fill(row.text, facts), source=fill(row.source, facts), rule=row.id)


def _borders(facts: Facts, branch: Branch, applying: Sequence[Vote], form: Form) -> list[str]:
    """Where the answer turns: rows that support it, and rows that would support another."""
    supporting = [vote for vote in applying if vote.branch == branch]
    opposing = [vote for vote in VOTES if vote not in applying and vote.branch != branch]
    texts = [form.border]
    texts += [text for vote in supporting for text in (vote.border, vote.undone_by)]
    texts += [vote.border for vote in opposing]
    return [fill(text, facts) for text in dict.fromkeys(texts) if text]


def _measured(resolved: Resolved) -> list[str]:
    """What of the user's own was found, and whether it counts."""
    lines = []
    for found in resolved.facts.experiences:
        counts = "counts here" if found.why_not is None else f"does not count: {found.why_not}"
        lines.append(f"{found.folder}: {found.text}; {counts}")
    return [*lines, *resolved.faults]
