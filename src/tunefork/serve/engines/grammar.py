"""Answers that match a grammar: JSON, a JSON schema, a regular expression. By llguidance (MIT),
the extra `grammar`; without it the engine has no grammars, and says so.

Before each token the grammar says which tokens may come; after it, it moves on. Both are some
hundred microseconds of Rust.
"""

import importlib.util
import json
from typing import Any

import torch
from torch import Tensor

from tunefork.errors import BadInputError
from tunefork.serve.engine import Grammar

_JSON = {"whitespace_pattern": r"\n? {0,16}"}
"""Indentation, but no white space without end, which small models fall into."""
KINDS = frozenset({"json_object", "json_schema", "regex"})


def is_available() -> bool:
    """Whether llguidance is installed."""
    return importlib.util.find_spec("llguidance") is not None


class Grammars:
    """Makes matchers for one tokenizer."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        """`vocabulary` is the number of logits."""
        import llguidance.hf

        known = len(tokenizer)
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(known, vocabulary))
        self.vocabulary = vocabulary

    def matcher(self, grammar: Grammar) -> "Matcher":
        """Raises BadInputError where it is no grammar that can be had."""
        from llguidance import LLMatcher

        try:
            match grammar.kind:
                case "json_object":
                    anything = json.dumps({"type": "object"})
                    text = LLMatcher.grammar_from_json_schema(anything, overrides=_JSON)
                case "json_schema":
                    text = LLMatcher.grammar_from_json_schema(grammar.value, overrides=_JSON)
                case "regex":
                    text = LLMatcher.grammar_from_regex(grammar.value)
            matcher = LLMatcher(self._tokenizer, text, log_level=0)
        except (ValueError, TypeError) as error:
            raise _refusal(grammar, str(error)) from error
        if matcher.is_error():
            raise _refusal(grammar, matcher.get_error())
        return Matcher(matcher, self.vocabulary)


def _refusal(grammar: Grammar, why: str) -> BadInputError:
    return BadInputError(f"{grammar.kind}: no grammar can be made of it: {why[:200]}")


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> Tensor:
        """(V,) boolean: which tokens may come next."""
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten()[: self._vocabulary].bool()

    def take(self, token: int) -> bool:
        """Move on by `token`; whether nothing more may follow."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())
