"""How much there is to train on, and what is assumed where it was not said.

Lengths and supervised shares by task are round numbers of ours, not measurements; an answer that
rests on them says so. `tunefork data check RECIPE` counts the real ones.
"""

from dataclasses import dataclass
from math import ceil

from tunefork.advise.situation import Situation, Task


@dataclass(frozen=True, slots=True)
class Typical:
    """What an example of a task is usually like."""

    tokens: int
    """Of one example, prompt included."""
    supervised_share: float
    """Share of them that is learnt."""


TYPICAL: dict[Task, Typical] = {
    "classification": Typical(250, 0.04),
    "extraction": Typical(600, 0.2),
    "summarization": Typical(1500, 0.15),
    "translation": Typical(200, 0.45),
    "question_answering": Typical(400, 0.3),
    "chat": Typical(600, 0.4),
    "style": Typical(500, 0.6),
    "code": Typical(700, 0.5),
    "reasoning": Typical(1000, 0.8),
    "tool_use": Typical(1000, 0.2),
    "facts": Typical(150, 0.4),
    "domain_language": Typical(2000, 1.0),
    "distillation": Typical(800, 0.7),
    "other": Typical(600, 0.4),
}
UNSAID_EXAMPLES = 5_000
"""Assumed where neither examples nor tokens are given: the low end of mission.md's rule 14."""
LONGEST = 4096
"""Longest sequence proposed, tokens; also that of plain text, which is cut into such pieces."""
FEW_STEPS = 100
"""Fewer optimiser steps want a smaller batch and a higher rate (LoRA Without Regret)."""


@dataclass(frozen=True, slots=True)
class Amount:
    """The training data in numbers; of one customer where there are several."""

    examples: int
    """Sequences of `max_length` where the text is plain."""
    tokens: int
    """Of one pass, prompts included."""
    supervised_tokens: int
    epochs: float
    max_length: int
    batch_size: int
    """Examples of one optimiser step."""
    is_plain_text: bool
    note: str
    """What of it was assumed."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return max(1, ceil(self.examples * self.epochs / self.batch_size))


def is_plain_text(situation: Situation) -> bool:
    """Whether documents are learnt, not answers."""
    return situation.task == "domain_language" or (
        situation.change == "domain_language" and situation.task in (None, "other")
    )


def amount_of(situation: Situation) -> Amount:
    """The amount said, or assumed where it was not."""
    plain = is_plain_text(situation)
    typical = TYPICAL["domain_language" if plain else situation.task or "other"]
    examples, tokens, note = _said_or_assumed(situation, typical)
    mean = tokens / max(1, examples)
    length = LONGEST if plain else _length_for(mean)
    if plain:
        examples = max(1, ceil(tokens / length))
    epochs = 1.0 if plain or examples >= 20_000 else 2.0 if examples >= 2_000 else 3.0
    return Amount(
        examples=examples,
        tokens=tokens,
        supervised_tokens=max(1, round(tokens * typical.supervised_share)),
        epochs=epochs,
        max_length=length,
        batch_size=_batch(examples * epochs, tokens if plain else 0),
        is_plain_text=plain,
        note=note,
    )


def _said_or_assumed(situation: Situation, typical: Typical) -> tuple[int, int, str]:
    """Examples, tokens, and what of them was assumed."""
    examples, tokens = situation.examples, situation.tokens
    if examples is None and tokens is None:
        examples = UNSAID_EXAMPLES
        tokens = examples * typical.tokens
        return examples, tokens, f"{examples:,} examples of {typical.tokens:,} tokens each"
    if tokens is None:
        assert examples is not None
        note = f"{typical.tokens:,} tokens an example"
        return max(1, examples), max(1, examples) * typical.tokens, note
    if examples is None:
        note = f"{typical.tokens:,} tokens an example"
        return max(1, round(tokens / typical.tokens)), max(1, tokens), note
    share = f"{typical.supervised_share:.0%} of the tokens are learnt"
    return max(1, examples), max(1, tokens), share


def _length_for(mean: float) -> int:
    """A power of two that leaves room for examples three times as long as the mean."""
    length = 128
    while length < min(LONGEST, 3 * mean):
        length *= 2
    return max(length, 2 ** ceil(mean - 1).bit_length()) if mean > LONGEST else length


def _batch(seen: float, plain_tokens: int) -> int:
    """Examples a step: 16, fewer where that leaves few steps, more for very much plain text."""
    if plain_tokens >= 1_000_000_000:
        return 128
    if plain_tokens >= 10_000_000:
        return 32
    return next((batch for batch in (16, 8) if seen / batch >= FEW_STEPS), 4)
