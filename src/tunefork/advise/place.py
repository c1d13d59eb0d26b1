"""Where to train: the GPUs at hand, the cheapest machine that fits, or a managed service."""

from datetime import date
from typing import Literal

from tunefork.advise.advice import Managed, Own, Where
from tunefork.advise.estimate import Placed, gpu_ids, machine_text
from tunefork.advise.facts import Facts
from tunefork.advise.rules import Answer
from tunefork.page.units import seconds_text, usd_text
from tunefork.plan.catalogue import Offer
from tunefork.recipe import Method

SETUP_HOURS = 1.0
"""What a rented machine is idle for until the run is right: the advantage of a managed service."""


def where(facts: Facts, answer: Answer, method: Method, today: date) -> Where:
    """The places for `method`, and which of them to take."""
    here, cheapest = facts.estimates.here(method), facts.estimates.cheapest(method)
    best = facts.best(method) or here
    own = None if best is None else _own(facts, best)
    offers = [_managed(facts, answer, offer) for offer in _offers(facts, today)]
    managed = sorted(offers, key=lambda offer: not offer.is_usable)
    recommended, text = _choice(facts, own, managed)
    return Where(
        recommended=recommended,
        text=text,
        own=own,
        at_hand=None if here is None else _own(facts, here),
        cheapest=None if cheapest is None else _own(facts, cheapest),
        managed=managed,
    )


def nowhere() -> Where:
    """Where nothing is trained."""
    return Where(
        recommended="none",
        text="Nothing is trained.",
        own=None,
        at_hand=None,
        cheapest=None,
        managed=[],
    )


def _own(facts: Facts, placed: Placed) -> Own:
    gpu, count = placed.machine.gpu, placed.machine.count
    note = (
        f"{usd_text(gpu.usd_per_hour * count)} an hour, approximate "
        f"({gpu.price_source}, {gpu.price_date})"
    )
    if placed.smaller_tokens is not None:
        shorter = "" if placed.shorter is None else f"data.max_length: {placed.shorter} and "
        note = f"with {shorter}train.micro_batch_tokens: {placed.smaller_tokens}; {note}"
    elif not placed.fits:
        may = "may not fit" if placed.figures.may_fit else "does not fit"
        note = f"{may}: {placed.figures.next_option or 'take a larger GPU'}; {note}"
    seconds = placed.figures.total_s * facts.tenants
    deadline = facts.situation.deadline_hours
    if deadline is not None and seconds > deadline * 3600:
        note = f"{seconds_text(seconds)}, longer than the deadline of {deadline:g} h; {note}"
    return Own(
        machine=machine_text(placed.machine),
        gpus=list(gpu_ids(placed.machine)),
        fits=placed.fits,
        is_at_hand=placed.machine == facts.estimates.at_hand,
        seconds=seconds,
        cost_usd=placed.cost_usd * facts.tenants,
        note=note,
    )


def _offers(facts: Facts, today: date) -> list[Offer]:
    tokens = facts.amount.tokens * facts.amount.epochs * facts.tenants
    return facts.estimates.catalogue.managed(facts.params, tokens, today)


def _managed(facts: Facts, answer: Answer, offer: Offer) -> Managed:
    service = offer.service
    until = service.self_serve_until
    return Managed(
        id=service.id,
        name=service.name,
        cost_usd=offer.cost_usd,
        is_usable=(why_not := _why_not(facts, answer, offer)) is None,
        why_not=why_not,
        self_serve_until=None if until is None else until.isoformat(),
        source=service.source,
        date=service.date.isoformat(),
    )


def _why_not(facts: Facts, answer: Answer, offer: Offer) -> str | None:
    """The first thing that speaks against a service."""
    service, situation = offer.service, facts.situation
    is_full = answer not in ("lora", "qlora")
    against = (
        (situation.data_may_leave is False, "the data may not leave"),
        (not offer.is_open, f"takes no new jobs since {service.self_serve_until}"),
        (service.closed and situation.distribute is True, "its weights cannot be handed on"),
        (service.closed and is_full, "its weights cannot be had"),
        (is_full and "full" not in service.methods, "no full fine-tuning at this price"),
        (service.closed, "its own model in place of yours; compare the quality first"),
    )
    return next((why for applies, why in against if applies), None)


def _choice(
    facts: Facts, own: Own | None, managed: list[Managed]
) -> tuple[Literal["own", "managed", "none"], str]:
    """Own or managed, and why."""
    usable = [service for service in managed if service.is_usable]
    leave = facts.situation.data_may_leave
    if own is None:
        if usable and leave:
            return "managed", f"It fits no machine of up to eight GPUs; {usable[0].name} takes it."
        return "none", "It fits no machine of up to eight GPUs of the catalogue."
    if leave is False:
        return "own", "The data may not leave the house."
    if not usable:
        return "own", "No managed service of the catalogue does this with your model."
    cheapest = usable[0]
    price = f"{cheapest.name} asks about {usd_text(cheapest.cost_usd)}"
    if leave is None:
        return "own", f"Whether the data may leave was not said; if it may, {price}."
    if own.is_at_hand and own.fits:
        return "own", f"The GPUs are at hand; {price}."
    setup = SETUP_HOURS * own.cost_usd / own.seconds * 3600 * facts.tenants if own.seconds else 0
    rent = own.cost_usd + setup
    if facts.tenants > 1:
        return "own", f"{facts.tenants} adapters over one base want a server of your own; {price}."
    if cheapest.cost_usd < rent:
        text = f"{price}, {own.machine} about {usd_text(own.cost_usd)} and an hour to set up."
        return "managed", text
    return "own", f"{own.machine} costs about {usd_text(own.cost_usd)}; {price}."
