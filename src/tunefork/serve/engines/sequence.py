"""One request while it is answered: its tokens, what it holds, and how its answer ends."""

import random
from collections import Counter, deque
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
    drawn: deque[float] = field(default_factory=deque)
    """Numbers for the next tokens, where they are sampled; each is kept until there is its token,
    whatever was computed in vain meanwhile."""

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
    def changes_logits(self) -> bool:
        """Before a token is chosen: by a grammar or penalties, for which the tokens before it must
        be known, or by a bias."""
        sampling = self.request.sampling
        penalties = sampling.presence_penalty or sampling.frequency_penalty
        return bool(self.matcher is not None or penalties or sampling.logit_bias)

    @property
    def tokens_suffice(self) -> bool:
        """Of a pass it wants the token that is chosen there, and nothing else that is in the
        logits."""
        return not self.changes_logits and self.request.sampling.logprobs is None

    def choice_of_pass(self, behind: int = 0) -> Choice | None:
        """How the pass draws its next token, or the one so many `behind` it. None: it is not drawn,
        or not there."""
        sampling = self.request.sampling
        if sampling.temperature == 0.0 or self.changes_logits:
            return None
        number = self._number(behind)
        choice = Choice(sampling.temperature, sampling.top_k, sampling.top_p, number)
        return choice if choice.is_drawn else None

    def choice(self) -> Choice:
        """How its next token is chosen. Asked again before `take`, it says the same."""
        sampling = self.request.sampling
        changes: dict[int, float] = dict(sampling.logit_bias)
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token, count in self.counts.items():
                by = sampling.presence_penalty + count * sampling.frequency_penalty
                changes[token] = changes.get(token, 0.0) - by
        return Choice(
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            self._number(0) if sampling.temperature > 0.0 else 0.0,
            tuple(changes.items()),
            None if self.matcher is None else self.matcher.allowed(),
        )

    def _number(self, behind: int) -> float:
        """For the token so many `behind` the next one."""
        while len(self.drawn) <= behind:
            self.drawn.append(self.random.random())
        return self.drawn[behind]

    def take(self, token: int) -> FinishReason | None:
        """Add a chosen token; why the answer ends with it, if it does."""
        if self.drawn:
            self.drawn.popleft()
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
