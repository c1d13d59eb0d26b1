"""Passes one ahead: the next one is launched before the host has seen the tokens of the last.

Between a pass's end and the next one's launch a GPU has nothing to do, and the host has much:
tokens are taken, the next pass is planned, laid out and launched, an eighth of the time of a
decoding pass of an 8B model. But the likeliest tokens are chosen on the GPU, and all else that the
next pass of the same requests needs is known without them. So it is launched behind the one under
way, and reads its ids there (`Follows`).

A request may turn out to have ended with the last pass (a stop token, a stop text, nobody waits for
it any more). Then its row was computed in vain: its token is dropped, and it has given up its
region and its slot when that row is still to be computed. That is safe, because whoever has them
next comes later on the same stream: passes, moves within the cache and trials of adapters are
launched there, and an adapter is copied into a slot once all is done that had been launched when
the slot was given up (`slots.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tunefork.serve.engines.launched import Follows, Launched
from tunefork.serve.engines.layout import BASE, Part
from tunefork.serve.engines.scheduler import Planned, Scheduler, by_slot
from tunefork.serve.engines.sequence import Sequence as Answer

_UNKNOWN = (0,)
"""In place of the id of a token that only the device knows."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A pass under way."""

    planned: Sequence[Planned]
    launched: Launched

    @property
    def answers(self) -> list[Answer]:
        """For whom it chooses a token, in the order of its rows."""
        return [answer for answer, part in self.planned if part.wants_logits]


def plan_ahead(flight: Flight, scheduler: Scheduler) -> tuple[list[Planned], Follows] | None:
    """The decoding pass behind `flight`, of which no token is known; the same that the scheduler
    would plan if no answer ended by its token.

    None where it has to wait for them: they are not simply the likeliest, a prompt is to be
    computed, someone could take the place of an answer that is as long as it may be, or the cache
    is full.
    """
    rows = {answer: row for row, answer in enumerate(flight.answers)}
    running = scheduler.running
    if not all(answer.tokens_suffice for answer in rows):
        return None
    if not all(answer in rows for answer in running):
        return None
    going_on = [answer for answer in running if not _is_last(answer)]
    if not going_on or (len(going_on) < len(running) and scheduler.waiting):
        return None
    if not all(_has_room(answer, scheduler) for answer in going_on):
        return None
    going_on.sort(key=by_slot)
    planned = [(answer, _part(answer)) for answer in going_on]
    return planned, Follows(flight.launched.tokens_r, [rows[answer] for answer in going_on])


def _is_last(answer: Answer) -> bool:
    """The token that is being computed is the last that it may have."""
    return answer.num_answered + 1 >= answer.request.sampling.max_tokens


def _has_room(answer: Answer, scheduler: Scheduler) -> bool:
    """Whether the cache has room for one token more, where the others lie."""
    assert answer.region is not None
    grown = scheduler.cache.regions.grow(answer.region, len(answer.tokens) + 1)
    if grown is not None:
        answer.region = grown
    return grown is not None


def _part(answer: Answer) -> Part:
    assert answer.region is not None
    slot = BASE if answer.slot is None else answer.slot
    return Part(_UNKNOWN, len(answer.tokens), answer.region.start, slot, wants_logits=True)
