"""What does not work out as asked, as a table: when, and what is said with what to do."""

from collections.abc import Callable, Iterator

from tunefork.advise.estimate import PATIENCE_S
from tunefork.advise.facts import Facts
from tunefork.advise.figures import fill
from tunefork.recipe import Method

Check = Callable[[Facts, Method], bool]


def _over_budget(facts: Facts, method: Method) -> bool:
    return facts.is_over_budget(method) and facts.best(method) is not None


def _too_slow(facts: Facts, method: Method) -> bool:
    return facts.is_too_slow(method) and facts.best(method) is not None


def _long(facts: Facts, method: Method) -> bool:
    has_deadline = facts.situation.deadline_hours is not None
    placed = facts.best(method)
    return not has_deadline and placed is not None and facts.seconds(method) > PATIENCE_S


def _fits_nowhere(facts: Facts, method: Method) -> bool:
    return facts.best(method) is None


def _not_at_hand(facts: Facts, method: Method) -> bool:
    return not facts.fits_here(method) and facts.best(method) is not None


def _bound_to_hand(facts: Facts, method: Method) -> bool:
    return not facts.fits_here(method) and facts.situation.data_may_leave is False


def _leaks(facts: Facts, method: Method) -> bool:
    return facts.situation.distribute is True and facts.situation.data_may_leave is False


def _several_gpus(facts: Facts, method: Method) -> bool:
    placed = facts.best(method)
    return placed is not None and placed.machine.count > 1


CAUTIONS: tuple[tuple[Check, str], ...] = (
    (
        _over_budget,
        "It costs about {%_cost} on {%_where}, more than the budget of {budget}: take a smaller "
        "model, fewer tokens (cost grows with both), or raise the budget.",
    ),
    (
        _too_slow,
        "It takes about {%_time} on {%_where}, longer than {deadline}: take a smaller model, fewer "
        "tokens, or a faster machine (of up to eight GPUs, {%_cheapest} is the cheapest in time, "
        "or the fastest).",
    ),
    (
        _long,
        "It takes about {%_time} on {%_where}, and no deadline was said: take a smaller model, "
        "fewer tokens, or say deadline_hours, and faster machines are looked for.",
    ),
    (
        _fits_nowhere,
        "It needs {%_peak} on each GPU and fits no machine of up to eight GPUs of the catalogue: "
        "take a smaller model or a shorter data.max_length.",
    ),
    (
        _not_at_hand,
        "It does not fit {gpus} as planned ({%_peak} needed on each, {memory} there): "
        "{%_where} would hold it.",
    ),
    (
        _bound_to_hand,
        "The data may not leave, so the machine must come to it, or the model must be smaller.",
    ),
    (
        _several_gpus,
        "It needs {%_where}: planned here with everything sharded, but tunefork train runs on one "
        "GPU so far, so that takes another tool.",
    ),
    (
        _leaks,
        "The data may not leave but the weights are handed out: models reproduce parts of what "
        "they were trained on; have that checked first.",
    ),
)
"""`%` in a text stands for the method."""


def cautions(facts: Facts, method: Method) -> Iterator[str]:
    """What to say of `method` in this situation."""
    for applies, text in CAUTIONS:
        if applies(facts, method):
            yield fill(text.replace("%", method.value), facts)
