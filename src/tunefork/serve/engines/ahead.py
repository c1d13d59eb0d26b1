"""Passes one ahead: the next one is launched before the host has seen the tokens of the last.

Between a pass's end and the next one's launch a GPU has nothing to do, and the host has much:
tokens are taken, the next pass is planned, laid out and launched, an eighth of the time of a
decoding pass of an 8B model. But tokens are chosen on the GPU, the likeliest or by numbers that
were drawn beforehand, and all else that the next pass needs is known without them. So it is
launched behind the one under way, and reads ids there (`Follows`).

A request may turn out to have ended with the last pass (a stop token, a stop text, nobody waits for
it any more). Then its row was computed in vain: its token is dropped, and it has given up its
region and its slot when that row is still to be computed. That is safe, because whoever has them
next comes later on the same stream: passes, trials of adapters in them, and moves within the cache
are launched there, and an adapter is copied into a slot once all is done that had been launched
when the slot was given up (`slots.py`). The number by which such a token was drawn belongs to its
place in that answer (`sequence.py`), and shifts no other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tunefork.serve.engines.launched import Follows, Launched
from tunefork.serve.engines.layout import Part
from tunefork.serve.engines.scheduler import Planned, Scheduler, by_slot, part_of
from tunefork.serve.engines.sequence import Sequence as Answer
from tunefork.serve.engines.trial import Trial

_UNKNOWN = (0,)
"""In place of the id of a token that only the device knows."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A pass under way."""

    planned: Sequence[Planned]
    launched: Launched
    trial: Trial | None = None

    @property
    def answers(self) -> list[Answer]:
        """For whom it chooses a token, in the order of its rows."""
        return [answer for answer, part in self.planned if part.wants_logits]


def plan_ahead(flight: Flight, scheduler: Scheduler) -> tuple[list[Planned], Follows] | None:
    """The pass behind `flight`, of whose tokens none is known: what the scheduler would plan if no
    answer ended by them. Prompts, also of those that have just come, are in it.

    None where it has to wait for them: somebody's token depends on those before it in a way that
    the host alone knows (a grammar, penalties), on a bias, or is told with what is in the logits
    (which the pass may overwrite before the host has seen them), there are none or all are the last
    ones of their answers, someone could take the place of such an answer, or the cache is full.
    """
    rows = {answer: row for row, answer in enumerate(flight.answers)}
    if not all(answer.tokens_suffice for answer in (*rows, *scheduler.running)):
        return None
    decoding = [answer for answer in scheduler.running if answer in rows]
    going_on = [answer for answer in decoding if not _is_last(answer)]
    if not going_on or (len(going_on) < len(decoding) and scheduler.waiting):
        return None
    if not all(_has_room(answer, scheduler) for answer in going_on):
        return None
    going_on.sort(key=by_slot)
    planned = [(answer, _part(answer)) for answer in going_on]
    ends = {answer: part.position + len(part.ids) for answer, part in flight.planned}
    prompts = [
        (answer, ends.get(answer, answer.computed))
        for answer in scheduler.running
        if answer not in rows
    ]
    follows = Follows(flight.launched.tokens_r, [rows[answer] for answer in going_on])
    return planned + scheduler.pieces(prompts), follows


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
    """Of the token behind all that are known."""
    known = part_of(answer, len(answer.tokens), 0, behind=1)
    return known._replace(ids=_UNKNOWN)
