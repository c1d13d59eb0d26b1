"""An adapter is tried before anything it says is told: what it does to the logits of a few tokens.

One that changes none is not the adapter that somebody wanted, and one whose logits are not finite
answers nobody; both are said once, when it comes, rather than in every answer.

Nobody waits for that. On a GPU a trial is two rows more, the last ones, of the pass that holds the
first piece of a prompt for the adapter. The verdict is made on the device behind that pass, and is
on the host with its tokens, before any of them is told. A pass of its own, even one that is not
waited for, would hold up all other answers for most of a decoding pass, and a prompt that waited
for the verdict would come two passes later.

That an adapter without effect is found out takes rows that are rounded alike wherever they are.
Whether those of captured passes with prompts are is tried when the engine starts (`checked.py`).
Where they are not, where passes are launched, and on a CPU, a trial is a pass of its own, just
before: products in fp32 are rounded otherwise at another place among many rows there, so that 4 of
100 adapters without any effect seemed to have one.

Shape legend: R rows of which logits are wanted, V tokens of the vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tunefork.serve.engines.launched import Arriving, Follows, Launched
from tunefork.serve.engines.layout import BASE, Part
from tunefork.serve.engines.tier_entry import Entry

_TOKENS = 8
TRIED = 2
"""Rows of a trial: with the adapter, and without."""
ROOM = TRIED * _TOKENS
"""Tokens of a trial, and of the cache that it takes."""
NO_MEMORY = (
    "out of memory while an adapter was tried; start the server with less embedded.cache_tokens, "
    "or fewer embedded.slots"
)


@dataclass(frozen=True, slots=True)
class Trial:
    """In a pass that was launched."""

    entry: Entry
    began: float
    """time.monotonic() when its pass was about to be launched."""
    verdict: Arriving
    """As `verdict_of`."""

    def fault(self) -> str | None:
        """What is wrong with the adapter, if anything. Waits for the pass."""
        is_finite, differs = self.verdict.wait()
        if not is_finite:
            return "the logits it gives are not finite"
        return None if differs else "it changes no logit of this base"


class Runs(Protocol):
    """What of `passes.Passes` a trial needs."""

    max_rows: int

    @property
    def has_graphs(self) -> bool:
        """Passes of rows that decode are replayed."""

    def takes_trial(self, tokens: int) -> bool:
        """A trial's rows may be in a pass of so many tokens, theirs with them."""

    def run(self, parts: Sequence[Part], follows: Follows | None = None) -> Launched:
        """Launch a pass."""


def launch_with_trial(
    passes: Runs,
    parts: Sequence[Part],
    follows: Sequence[Follows],
    entry: Entry,
    start: int,
) -> tuple[Launched, Trial]:
    """Launch a pass of `parts`, and the trial of the adapter in `entry`'s slot, whose keys and
    values come to `start` in the cache: as that pass's last rows if it takes them, else in one
    before it."""
    assert entry.slot is not None
    began, tried = time.monotonic(), rows_of(entry.slot, start)
    if passes.takes_trial(sum(len(part.ids) for part in parts) + ROOM):
        launched = passes.run([*parts, *tried], *follows)
        return launched, Trial(entry, began, verdict_of(launched))
    if passes.has_graphs and passes.max_rows >= ROOM:
        tried = [one for part in tried for one in _by_token(part)]
    verdict = verdict_of(passes.run(tried), len(tried))
    return passes.run(parts, *follows), Trial(entry, began, verdict)


def rows_of(slot: int, start: int) -> list[Part]:
    """A trial of what is in `slot`: with it, then without, at `start` in the cache."""
    ids = [(7 * at + 3) % 64 for at in range(_TOKENS)]
    return [
        Part(ids, 0, start, slot, wants_logits=True),
        Part(ids, 0, start + _TOKENS, BASE, wants_logits=True),
    ]


def _by_token(part: Part) -> list[Part]:
    """Each token as a row that decodes, which sees those before it: they are in the cache before
    any row attends. Such a pass is captured, and its rows are rounded alike."""
    return [part._replace(ids=[token], position=at) for at, token in enumerate(part.ids)]


def verdict_of(launched: Launched, rows: int = TRIED) -> Arriving:
    """Of the trial in the last `rows` of a pass, before the next one is launched: whether the
    adapter's logits are finite, and whether any is not the base's."""
    own_rv, base_rv = launched.logits_rv[-rows:].chunk(TRIED)
    verdict = torch.stack([own_rv.isfinite().all(), (own_rv != base_rv).any()])
    return Arriving(verdict.long())
