"""An adapter is tried before it is served: what it does to the logits of a few tokens.

One that changes none is not the adapter that somebody wanted, and one whose logits are not finite
answers nobody; both are said once, when it comes, rather than in every answer.
"""

import torch

from tunefork.serve.engines.layout import BASE, Part
from tunefork.serve.engines.passes import Passes
from tunefork.serve.engines.regions import Region

_TOKENS = 8
TRIED = 2
"""Rows of a trial: with the adapter, and without."""
ROOM = TRIED * _TOKENS
"""Tokens of a trial, and of the cache that it takes."""


def try_adapter(passes: Passes, slot: int, region: Region) -> str | None:
    """What is wrong with the adapter in `slot`, if anything. Waits for the pass."""
    ids = [(7 * at + 3) % 64 for at in range(_TOKENS)]
    starts = {slot: region.start, BASE: region.start + _TOKENS}
    parts = [Part(ids, 0, start, whose, wants_logits=True) for whose, start in starts.items()]
    if passes.graphs is not None and passes.graphs.max_rows >= ROOM:
        # Each token as a row that decodes, which sees those before it: they are in the cache before
        # any row attends. A captured pass is done in half the time, and others wait for it.
        parts = [
            Part([token], at, part.start, part.slot, wants_logits=True)
            for part in parts
            for at, token in enumerate(part.ids)
        ]
    own_rv, base_rv = passes.run(parts).logits_rv.chunk(TRIED)
    if not bool(own_rv.isfinite().all()):
        return "the logits it gives are not finite"
    return "it changes no logit of this base" if torch.equal(own_rv, base_rv) else None
