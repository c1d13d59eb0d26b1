"""One request while it is answered: its tokens, what it holds, and how its answer ends."""

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tunefork.serve.detokenize import Detokenizer
from tunefork.serve.engine import EngineRequest, FinishReason
from tunefork.serve.engines.choose import Choice
from tunefork.serve.engines.grammar import Matcher
from tunefork.serve.engines.regions import Region

HEADROOM = 256
"""Tokens beyond those that are there for which room is taken in the cache."""


@dataclass(eq=False, slots=True)
class Sequence:
    """Engine thread only."""

    request: EngineRequest
    stream: Any
    """Where its pieces go."""
    arrived: float
    """time.monotonic()"""
    detokenizer: Detokenizer
    matcher: Matcher | None
    tokens: list[int]
    """The prompt's, then the answer's."""
    random: random.Random
    counts: Counter[int] = field(default_factory=Counter)
    """Of the answer's tokens."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    region: Region | None = None
    slot: int | None = None
    is_over: bool = False
    drawn: float | None = None
    """For the next token, where it is sampled; kept until there is one."""

    @property
    def num_answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def room(self) -> int:
        """Tokens for which it wants room in the cache."""
        left = self.request.sampling.max_tokens - self.num_answered
        return len(self.tokens) + min(left, HEADROOM)

    @property
    def decodes(self) -> bool:
        """All but its last token are computed."""
        return 0 < self.computed == len(self.tokens) - 1

    @property
    def tokens_suffice(self) -> bool:
        """Of a pass it wants the likeliest token, and nothing else that is in the logits."""
        sampling = self.request.sampling
        changes = sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty
        is_greedy = sampling.temperature == 0.0 and self.matcher is None and not changes
        return is_greedy and sampling.logprobs is None

    def choice(self) -> Choice:
        """How its next token is chosen. Asked again before `take`, it says the same."""
        sampling = self.request.sampling
        if sampling.temperature > 0.0 and self.drawn is None:
            self.drawn = self.random.random()
        changes: dict[int, float] = dict(sampling.logit_bias)
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token, count in self.counts.items():
                by = sampling.presence_penalty + count * sampling.frequency_penalty
                changes[token] = changes.get(token, 0.0) - by
        return Choice(
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            self.drawn or 0.0,
            tuple(changes.items()),
            None if self.matcher is None else self.matcher.allowed(),
        )

    def take(self, token: int) -> FinishReason | None:
        """Add a chosen token; why the answer ends with it, if it does."""
        self.drawn = None
        self.tokens.append(token)
        self.counts[token] += 1
        sampling = self.request.sampling
        if token in sampling.stop_ids:
            return "stop"
        if self.matcher is not None and self.matcher.take(token):
            return "stop"
        return "length" if self.num_answered >= sampling.max_tokens else None


def open_sequence(
    request: EngineRequest, stream: Any, now: float, tokenizer: Any, matcher: Matcher | None
) -> Sequence:
    """A sequence that nothing is computed of."""
    sampling = request.sampling
    return Sequence(
        request,
        stream,
        now,
        Detokenizer(tokenizer, request.prompt_ids, sampling.stop),
        matcher,
        list(request.prompt_ids),
        random.Random(sampling.seed),
    )
