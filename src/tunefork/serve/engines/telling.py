"""From a pass's logits to the tokens of its answers, and from tokens to what is told of them.

Tokens are chosen when a pass is there; their texts are made later, while a GPU computes the next
one. What goes wrong with one answer (its grammar, its text) is that answer's own error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunefork.errors import EngineError
from tunefork.kernels.draw import Draw, draw
from tunefork.serve.engine import FinishReason, Piece, TokenLogprob
from tunefork.serve.engines.choose import BAD, Choice, choose, log_probabilities
from tunefork.serve.engines.launched import Arriving, Launched
from tunefork.serve.engines.sequence import Sequence as Answer
from tunefork.serve.token_text import text_of

_Logprob = tuple[float, list[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class Event:
    """A token that was chosen, or why there is none."""

    answer: Answer
    token: int
    finish: FinishReason | None
    logprob: _Logprob | None
    error: EngineError | None = None


def read(answers: Sequence[Answer], launched: Launched, by: Draw = draw) -> list[Event]:
    """The next token of each answer that still runs, in the order of the pass's rows. Waits for the
    pass, which is the last one, or one of whose logits nothing is wanted. Rows behind those of the
    answers are a trial's, and nobody's. `by`: what draws tokens.

    Where it raises (memory), no answer has changed.
    """
    choices = {row: _choice(one) for row, one in enumerate(answers) if one.changes_logits}
    tokens = _tokens(launched, choices, by)[: len(answers)]
    told = _logprobs(answers, tokens, launched)
    events = []
    for row, (answer, token) in enumerate(zip(answers, tokens, strict=True)):
        if answer.region is None:
            continue  # it ended when this pass was under way
        choice, finish, error = choices.get(row), None, None
        if isinstance(choice, EngineError):
            error = choice
        elif token == BAD:
            error = EngineError("the model's logits are not finite (NaN)")
        else:
            try:
                finish = answer.take(token)
            except Exception as failure:  # of a grammar
                error = _failed("its grammar", failure)
        events.append(Event(answer, token, finish, told.get(row), error))
    return events


def piece_of(event: Event, tokenizer: Any) -> Piece | EngineError:
    """What is told of a token; with a finish reason where the answer is over."""
    answer, finish = event.answer, event.finish
    if event.error is not None:
        return event.error
    try:
        is_stop_id = finish == "stop" and event.token in answer.request.sampling.stop_ids
        text = "" if is_stop_id else answer.detokenizer.push([event.token])
        if answer.detokenizer.stopped:
            finish = "stop"
        elif finish is not None:
            text += answer.detokenizer.flush()
        logprobs = () if event.logprob is None or is_stop_id else (_spelt(event, tokenizer),)
    except Exception as failure:  # of a tokenizer
        return _failed("its text", failure)
    return Piece(text, (event.token,), logprobs, finish)


def _tokens(launched: Launched, choices: Mapping[int, Choice | EngineError], by: Draw) -> list[int]:
    """Of all rows: as the pass chose them, but by `choices` in theirs."""
    able = {row: one for row, one in choices.items() if not isinstance(one, EngineError)}
    if not able:
        return launched.arriving.wait()
    rows = torch.tensor(list(able), device=launched.logits_rv.device)
    chosen = Arriving(choose(launched.logits_rv.index_select(0, rows), [*able.values()], by))
    tokens = launched.arriving.wait()
    for row, token in zip(able, chosen.wait(), strict=True):
        tokens[row] = token
    return tokens


def _choice(answer: Answer) -> Choice | EngineError:
    try:
        return answer.choice()
    except Exception as failure:  # of a grammar
        return _failed("its grammar", failure)


def _failed(what: str, failure: Exception) -> EngineError:
    error = EngineError(f"{what} cannot be followed: {type(failure).__name__}: {failure}"[:300])
    error.__cause__ = failure
    return error


def _logprobs(
    answers: Sequence[Answer], tokens: Sequence[int], launched: Launched
) -> dict[int, _Logprob]:
    """By row, for those that asked."""
    asked = {
        row: answer.request.sampling.logprobs
        for row, answer in enumerate(answers)
        if answer.request.sampling.logprobs is not None and tokens[row] != BAD
    }
    if not asked:
        return {}
    rows = torch.tensor(list(asked), device=launched.logits_rv.device)
    most = max(number for number in asked.values() if number is not None)
    logits_rv = launched.logits_rv.index_select(0, rows)
    found = log_probabilities(logits_rv, [tokens[row] for row in asked], most)
    return {
        row: (own, top[:number])
        for (row, number), (own, top) in zip(asked.items(), found, strict=True)
    }


def _spelt(event: Event, tokenizer: Any) -> TokenLogprob:
    assert event.logprob is not None
    own, top = event.logprob
    return TokenLogprob(
        event.token,
        text_of(tokenizer, event.token),
        own,
        tuple((token, text_of(tokenizer, token), value) for token, value in top),
    )
